# Language modelling on real text that a machine without a network can make: descriptions of Debian's packages. A teacher made here on 11,800
# rows, a student a fifth of its size on 2,000. docs/tasks.md has the table.
#
#   python bench/data/standins.py --source real/debian.parquet --out real
#   make data stage1 RECIPE=packages ROLE=teacher
#   make data stage1 logits stage2 control measure compare RECIPE=packages

REAL   ?= real
SCORE   =
MODELS  = teacher stage1 control stage2
BUDGET  = --tokens-per-step 2048 --log-every 50 --threads 1 --samples 0
ifeq ($(ROLE),teacher)
NAME    = packages-teacher
SOURCE  = $(REAL)/text-teacher.parquet
STUDENT = $(REAL)/decoder-teacher
DATA_ARGS = --max-len 128 --long truncate --val 200
STAGE1_ARGS = $(BUDGET) --lr 3e-3 --steps 500 --eval-every 125
else
NAME    = packages
SOURCE  = $(REAL)/text.parquet
TEACHER = runs/packages-teacher/stage1
STUDENT = $(REAL)/decoder-student
DATA_ARGS = --max-len 128 --long truncate --val 500
STAGE1_ARGS = $(BUDGET) --lr 3e-3 --steps 200 --eval-every 50
STAGE2_ARGS = $(BUDGET) --lr 3e-3 --steps 300 --eval-every 50
endif
