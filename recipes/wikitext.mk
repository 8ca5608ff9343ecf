# Language modelling: GPT-2 (124M) teaches DistilGPT-2 (82M) on wikitext-2. Every token of a text is a target.
#
#   make data stage1 RECIPE=wikitext ROLE=teacher      # the teacher, fine-tuned on the same text
#   make data stage1 logits stage2 control measure compare RECIPE=wikitext
#
# The same on text that is here: recipes/packages.mk

SOURCE  = Salesforce/wikitext:wikitext-2-raw-v1/train
SCORE   =
DATA_ARGS = --max-len 512 --long truncate
ifeq ($(ROLE),teacher)
NAME    = wikitext-teacher
STUDENT = openai-community/gpt2
STAGE1_ARGS = --lr 5e-5 --epochs 1
else
NAME    = wikitext
TEACHER = runs/wikitext-teacher/stage1
STUDENT = distilbert/distilgpt2
STAGE1_ARGS = --lr 5e-5 --epochs 1
STAGE2_ARGS = --lr 5e-5 --epochs 2
endif
