# Into a domain in three stages, the teacher live beside the student: general data first, then more and more finance, then finance.
# Each stage starts from the best/ of the one before; a stage that is finished is skipped.
#
#   make data domain RECIPE=finance
#   make domain RECIPE=finance START_STAGE=2 END_STAGE=3    # e.g. with other flags in DOMAIN2, after ARGS=--fresh or another NAME
#
# The last stage keeps a tenth of general data, so that evaluation-driven sampling has two sources to weigh.

NAME    = finance
SOURCE  = general=tatsu-lab/alpaca finance=gbharti/finance-alpaca
TEACHER = Qwen/Qwen2.5-7B-Instruct
STUDENT = Qwen/Qwen2.5-0.5B-Instruct
DATA_ARGS = --max-len 512
DOMAIN_ARGS = --epochs 1
DOMAIN2 = --mix "general:0.7->0.3 finance:0.3->0.7" --temperature 2 --alpha 0.7 --lr 3e-5 $(BESIDE)
DOMAIN3 = --mix "general:0.1 finance:0.9" --temperature 1 --alpha 0.3 --lr 1e-5 --eval-sampling
