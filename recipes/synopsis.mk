# Summarisation on real text that a machine without a network can make: a Debian package's description -> its synopsis. SmolLM2-135M-Instruct,
# fine-tuned on 1,460 of them, teaches 20 of its own 30 layers on 600. docs/tasks.md has the table (two hours on one CPU core).
#
#   python bench/data/standins.py --source real/debian.parquet --out real
#   make data stage1 RECIPE=synopsis ROLE=teacher
#   make data stage1 logits stage2 control measure compare RECIPE=synopsis

REAL   ?= real
TOKENIZER = $(REAL)/smollm2
BUDGET  = --tokens-per-step 1024 --tokens-per-microbatch 1024 --samples 2 --sample-tokens 24 --threads 1
MODELS  = teacher stage1 control stage2
SCORE_ARGS = --max-new-tokens 32
ifeq ($(ROLE),teacher)
NAME    = synopsis-teacher
SOURCE  = $(REAL)/synopsis-teacher.parquet
STUDENT = $(REAL)/smollm2
DATA_ARGS = --max-len 200 --val 40
STAGE1_ARGS = $(BUDGET) --lr 1e-4 --steps 110 --eval-every 55
else
NAME    = synopsis
SOURCE  = $(REAL)/synopsis.parquet
TEACHER = runs/synopsis-teacher/stage1
STUDENT = $(TEACHER)
DATA_ARGS = --max-len 200 --val 150
LOGITS_ARGS = --tokens-per-microbatch 2048
STAGE1_ARGS = $(BUDGET) --lr 2e-4 --steps 44 --eval-every 22 --keep-layers 0,2,3,5,6,8,9,11,12,14,15,17,18,20,21,23,24,26,27,29
STAGE2_ARGS = $(BUDGET) --lr 2e-4 --steps 36 --eval-every 18
endif
