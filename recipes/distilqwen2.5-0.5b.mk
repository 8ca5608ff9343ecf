# The reference job: Qwen2.5-7B-Instruct -> Qwen2.5-0.5B on DistilQwen_100k, with the settings its authors published
# (stage 1: lr 2e-5, 3 epochs, cosine, warm-up 0.1, weight decay 0.05, at most 512 tokens; stage 2: half the weight on the teacher).
#
#   .venv/bin/hf download alibaba-pai/DistilQwen_100k --repo-type dataset --local-dir distilqwen_100k
#   make data stage1 logits stage2 RECIPE=distilqwen2.5-0.5b

NAME       = distilqwen
SOURCE     = distilqwen_100k
TEACHER    = Qwen/Qwen2.5-7B-Instruct
STUDENT    = Qwen/Qwen2.5-0.5B-Instruct
ALPHA      = 0.5
DATA_ARGS  = --max-len 512 --rows-per-chunk 20000
STAGE1_ARGS = --lr 2e-5 --epochs 3 --warmup 0.1 --weight-decay 0.05
STAGE2_ARGS = --lr 2e-5 --epochs 3 --warmup 0.1 --weight-decay 0.05
