# Reasoning: Qwen2.5-7B-Instruct teaches Qwen2.5-0.5B-Instruct on GSM8K, scored by the number after ####.
#
#   make data stage1 logits stage2 control measure compare RECIPE=gsm8k
#   make data ... DATA_ARGS="--max-len 512 --answers teacher --teacher Qwen/Qwen2.5-7B-Instruct"    # on the teacher's own solutions instead
#
# The same here, on word problems made by the demo: make demo

NAME    = gsm8k
SOURCE  = openai/gsm8k:main/train
TEACHER = Qwen/Qwen2.5-7B-Instruct
STUDENT = Qwen/Qwen2.5-0.5B-Instruct
DATA_ARGS = --max-len 512 --val 500
SCORE_ARGS = --max-new-tokens 320 --metrics exact
STAGE1_ARGS = --lr 1e-5 --epochs 2
STAGE2_ARGS = --lr 1e-5 --epochs 3
