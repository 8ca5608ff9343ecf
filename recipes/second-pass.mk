# A second pass on the original answers: stage 1 on answers that a teacher wrote, then stage 1 again, from the best/ of the first pass,
# on the answers that the data came with. The first command names the student and the teacher; the second finds the first's run by its
# name, $(NAME)-teacher (FIRST=... for another one), and takes model and tokenizer from there: give it no STUDENT. Then on as ever.
#
#   make data stage1 NAME=qa-teacher SOURCE=qa.parquet STUDENT=Qwen/Qwen2.5-0.5B DATA_ARGS="--answers teacher --teacher Qwen/Qwen2.5-7B-Instruct"
#   make data stage1 RECIPE=second-pass NAME=qa SOURCE=qa.parquet
#   make logits stage2 RECIPE=second-pass NAME=qa
#
# Both data sets hold out the same prompts, so that the second pass is measured on rows that neither has seen (while --val is a share,
# as it is by default). runs/qa/stage1 starts a schedule of its own: STAGE1_ARGS="--lr 5e-6 --epochs 1" for a gentle pass.

FIRST     = $(NAME)-teacher
STUDENT   = runs/$(FIRST)/stage1
TOKENIZER = $(STUDENT)/best
