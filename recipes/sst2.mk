# Sentiment with encoders: DistilBERT (67M), fine-tuned on SST-2, teaches a TinyBERT of 14M: of accuracy .911 the published student kept .893.
#
#   make data stage1 logits stage2 control measure compare RECIPE=sst2
#
# The student's repository holds a .bin file alone, which is a pickle: make safetensors of it once, in a folder of your own, and name that as STUDENT:
#   python -c "from transformers import AutoModel as M, AutoTokenizer as T; n, d = 'huawei-noah/TinyBERT_General_4L_312D', 'tinybert'; M.from_pretrained(n).save_pretrained(d); T.from_pretrained(n).save_pretrained(d)"
# (The published teacher was trained on these rows, the held-out ones among them: its own figures are too good here, the students' are not.)
# The same on data and models that can be made here: recipes/sections.mk

NAME    = sst2
SOURCE  = stanfordnlp/sst2
TEACHER = distilbert/distilbert-base-uncased-finetuned-sst-2-english
STUDENT = tinybert
DATA_ARGS = --task classify --columns text=sentence,label=label --max-len 128
STAGE1_ARGS = --lr 5e-5 --epochs 1 --tokens-per-step 2048 --best macro_f1
STAGE2_ARGS = --lr 5e-5 --epochs 3 --tokens-per-step 2048 --best macro_f1
