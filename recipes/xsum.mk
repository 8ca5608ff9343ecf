# Summarisation: Qwen2.5-1.5B-Instruct, fine-tuned on XSum, teaches Qwen2.5-0.5B-Instruct; scored by BLEU and ROUGE.
#
#   make data stage1 RECIPE=xsum ROLE=teacher
#   make data stage1 logits stage2 control measure compare RECIPE=xsum
#
# Both hold out the same twentieth of the prompts: with a share, which side a row is on follows from its prompt and the seed alone.
# The same here: recipes/synopsis.mk

SOURCE  = EdinburghNLP/xsum
COLUMNS = --columns prompt=document,answer=summary --system "Summarise the article in one sentence." --max-len 1024
SCORE_ARGS = --max-new-tokens 64 --limit 1000
ifeq ($(ROLE),teacher)
NAME    = xsum-teacher
STUDENT = Qwen/Qwen2.5-1.5B-Instruct
DATA_ARGS = $(COLUMNS) --limit 50000 --val 0.05
STAGE1_ARGS = --lr 1e-5 --epochs 1
else
NAME    = xsum
TEACHER = runs/xsum-teacher/stage1
STUDENT = Qwen/Qwen2.5-0.5B-Instruct
DATA_ARGS = $(COLUMNS) --limit 20000 --val 0.05
STAGE1_ARGS = --lr 2e-5 --epochs 1
STAGE2_ARGS = --lr 2e-5 --epochs 2
endif
