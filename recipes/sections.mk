# Classification on real text that a machine without a network can make: which of ten sections a Debian package belongs to, by its description. A
# teacher made here on 8,500 rows, a student less than a quarter of its size on 2,000. docs/tasks.md has the table.
#
#   python bench/data/standins.py --source real/debian.parquet --out real
#   make data stage1 RECIPE=sections ROLE=teacher
#   make data stage1 logits stage2 control measure compare RECIPE=sections      # KIND=decoder: the same with decoders; SEED=1: another student

KIND   ?= encoder
REAL   ?= real
COLUMNS = --task classify --max-len 64
BUDGET  = --tokens-per-step 2048 --log-every 50 --threads 1 --best macro_f1
ifeq ($(ROLE),teacher)
NAME    = sections-$(KIND)-teacher
SOURCE  = $(REAL)/sections-teacher.parquet
STUDENT = $(REAL)/$(KIND)-teacher
DATA_ARGS = $(COLUMNS) --val 500
STAGE1_ARGS = $(BUDGET) --lr 5e-4 --steps 1000 --eval-every 200
else
NAME    = sections-$(KIND)
SOURCE  = $(REAL)/sections.parquet
TEACHER = runs/sections-$(KIND)-teacher/stage1
STUDENT = $(REAL)/$(KIND)-student
RUNS    = runs/$(NAME)$(if $(filter-out 0,$(SEED)),-$(SEED))
DATA_ARGS = $(COLUMNS) --val 1500
STAGE1_ARGS = $(BUDGET) --lr 2e-3 --steps 250 --eval-every 50 --seed $(SEED)
STAGE2_ARGS = $(BUDGET) --lr 2e-3 --steps 800 --eval-every 100 --seed $(SEED)
endif
