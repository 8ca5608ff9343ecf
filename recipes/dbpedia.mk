# Topics with decoders: Qwen2.5-1.5B gets a head for the 14 classes of DBpedia, is fine-tuned, and teaches Qwen2.5-0.5B.
#
#   make data stage1 RECIPE=dbpedia ROLE=teacher
#   make data stage1 logits stage2 control measure compare RECIPE=dbpedia
#
# The student sees 20,000 rows, every class in its share; both hold out the same 2,000 (of every class those with the smallest
# hashes). The same here: recipes/sections.mk with KIND=decoder

SOURCE  = fancyzhx/dbpedia_14
COLUMNS = --task classify --columns text=content,label=label --max-len 256
ifeq ($(ROLE),teacher)
NAME    = dbpedia-teacher
STUDENT = Qwen/Qwen2.5-1.5B
DATA_ARGS = $(COLUMNS) --limit 100000 --val 2000
STAGE1_ARGS = --lr 2e-5 --epochs 1 --best macro_f1
else
NAME    = dbpedia
TEACHER = runs/dbpedia-teacher/stage1
STUDENT = Qwen/Qwen2.5-0.5B
DATA_ARGS = $(COLUMNS) --limit 20000 --val 2000
STAGE1_ARGS = --lr 2e-5 --epochs 1 --best macro_f1
STAGE2_ARGS = --lr 2e-5 --epochs 2 --best macro_f1
endif
