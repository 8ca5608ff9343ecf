# The domain recipe on real data that a laptop can make (docs/domain.md says how): general = one-line summaries of Debian packages, the domain =
# Python's standard library, as questions about it (doc) and as code to write (code). SmolLM2-135M teaches 24 of its own 30 layers.
#
#   make data stage1 domain RECIPE=stdlib REAL=real

NAME    = stdlib
SOURCE  = general=$(REAL)/general.parquet doc=$(REAL)/doc.parquet code=$(REAL)/code.parquet
TEACHER = $(REAL)/smollm2
TOKENIZER = $(TEACHER)
STUDENT = $(TEACHER)
DOMAIN_STUDENT = $(RUNS)/stage1
DATA_ARGS = --max-len 200 --val 0.06
RUN     = --tokens-per-step 1024 --tokens-per-microbatch 1024 --samples 2 --sample-tokens 40
STAGE1_ARGS = $(RUN) --keep-layers 0,1,2,3,5,6,7,8,10,11,12,13,15,16,17,18,20,21,22,23,25,26,27,29 --mix "general:1" --lr 3e-4 --steps 24 --eval-every 12
DOMAIN_ARGS = $(RUN) --steps 24 --eval-every 8
DOMAIN1 = --mix "general:1" --temperature 4 --alpha 0.9 --lr 3e-4
DOMAIN2 = --mix "general:0.7->0.3 doc:0.15->0.4 code:0.15->0.3" --temperature 2 --alpha 0.7 --lr 2e-4 $(BESIDE)
DOMAIN3 = --mix "doc:0.6 code:0.4" --temperature 1 --alpha 0.3 --lr 1e-4 --eval-sampling
