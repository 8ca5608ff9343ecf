# One command a target: `make -n TARGET` is the documentation. The scripts skip finished work and continue unfinished work themselves.
# A published set-up is a file of variables: make stage1 RECIPE=distilqwen2.5-0.5b

NAME    = mydata
SOURCE  = $(NAME).parquet
TEACHER = Qwen/Qwen2.5-7B-Instruct
STUDENT = Qwen/Qwen2.5-0.5B
TOKENIZER = $(STUDENT)
# make logits: where a server has TEACHER, by the name that it has there: TEACHER_URL=http://HOST:8000/v1
TEACHER_URL =
# or where another tool has dumped its logits: IMPORT="a.jsonl b/", FORMAT=easydistill, axolotl, distillkit or verl
IMPORT  =
FORMAT  =
TEACHER_IS = $(if $(IMPORT),--import $(call some,$(IMPORT)) --format $(FORMAT),$(if $(TEACHER_URL),--teacher-url $(TEACHER_URL) --teacher-model,--teacher) $(call one,$(TEACHER)))
HOLDS   = $(call unless_served,K,--k) $(call unless_served,TEMPERATURES,--temperatures)
# a served teacher, and an import, have their own defaults: only what was asked for
unless_served = $(if $(if $(TEACHER_URL)$(IMPORT),$(filter command environment,$(origin $(1))),yes),$(2) $($(1)))
DATA    = data/$(NAME)
LOGITS  = logits/$(NAME)
RUNS    = runs/$(NAME)
CHUNK   = all
K       = 16
T       = $(if $(TEACHER_URL)$(IMPORT),1,2)
TEMPERATURES = 1,2,4
ALPHA   = 0.9
CKPT    = $(RUNS)/stage2
ARGS    =
SEED    = 0
# make stage1, stage2, control, own: as many processes of torchrun, a GPU each
GPUS    =
# make control: stage 1 goes on with stage 2's flags, but those of its method
CONTROL_ARGS = $(STAGE2_ARGS)
# make measure: what is measured, of what is there; SCORE= (empty): no answers are written and scored
CLASSES = $(findstring --task classify,$(DATA_ARGS))
# a student cut from its teacher (--keep-layers) was no model before: step 0 of stage 1 has measured it
CUT     = $(shell grep -Eqs '"keep_layers": (\[$$|[1-9])' $(call one,$(RUNS)/stage1/config.json) && echo cut)
MODELS  = teacher $(if $(CLASSES)$(CUT),,base) stage1 control stage2 own1 own2 own3 own4 own5 own6 own7 own8 own9
SCORE   = $(if $(CLASSES),,yes)
# make own: which round, and how many answers to a prompt
ROUND   = 1
GENERATIONS = 4
OWN     = $(word $(ROUND),own1 own2 own3 own4 own5 own6 own7 own8 own9)
BEFORE  = $(word $(ROUND),stage2 own1 own2 own3 own4 own5 own6 own7 own8)
ANSWERS_ARGS = $(DATA_ARGS)
OWN_ARGS = $(STAGE2_ARGS)
# make domain: from stage START_STAGE to END_STAGE; the flags of each (the sources are called general and domain, unless a RECIPE says otherwise)
START_STAGE = 1
END_STAGE   = 3
DOMAIN_STUDENT = $(STUDENT)
DOMAIN1 = --mix "general:1" --temperature 4 --alpha 0.9 --lr 5e-5
DOMAIN2 = --mix "general:0.7->0.3 domain:0.3->0.7" --temperature 2 --alpha 0.7 --lr 3e-5 $(BESIDE)
DOMAIN3 = --mix "domain:1" --temperature 1 --alpha 0.3 --lr 1e-5
BESIDE  = --feature-weight 1 --attention-weight 1 --contrastive-weight 1 --balance gradnorm

ifdef RECIPE
include recipes/$(RECIPE).mk
endif

ifneq ($(and $(ARGS),$(word 2,$(MAKECMDGOALS))),)
$(info ARGS="$(ARGS)" goes to each of: $(MAKECMDGOALS). For one of them alone: STAGE1_ARGS, STAGE2_ARGS ... (make help))
endif
# values are words of the shell, whatever is in them (My Drive/it's); quotes of their own around them are taken off
TYPED  := $(foreach v,RECIPE NAME SOURCE STUDENT TOKENIZER TEACHER DATA LOGITS RUNS,$(if $(filter command,$(origin $(v))),$(v)))
hash   := \#
HARD   := ' " ` \ ; & ( ) < > | * ? [ ] { } ! ~ $$ $(hash)
blank  := $(subst ,, )
bare = $(subst //blank//,$(blank),$(patsubst "%",%,$(patsubst '%',%,$(subst $(blank),//blank//,$(1)))))
one = $(if $(word 2,$(1))$(strip $(foreach c,$(HARD),$(findstring $(c),$(1)))),'$(subst ','\'',$(1))',$(1))
there = $(if $(shell test -e $(call one,$(1)) && echo yes),$(call one,$(1)))
# one place, or else several, as the shell divides them
some = $(or $(call there,$(call bare,$(1))),$(1))
again = $(foreach v,$(TYPED),$(v)=$(call one,$($(v))))
$(foreach v,DATA LOGITS RUNS CKPT STUDENT TOKENIZER TEACHER DOMAIN_STUDENT,$(eval override $(v) := $$(call bare,$$($(v)))))

PYTHON  ?= python3
PY      := .venv/bin/python
TRAIN   = $(if $(GPUS),.venv/bin/torchrun --standalone --nproc-per-node $(GPUS),$(PY))
PIP     ?=
INSTALL = .venv/bin/pip install --disable-pip-version-check --no-compile --progress-bar off -q -c constraints.txt $(PIP)

# threads that wait asleep: a machine shared with other work loses a factor of ten otherwise
export OMP_WAIT_POLICY ?= PASSIVE
# set-up leaves it to the first import to compile a module, for most are never imported: let it keep what it compiled
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup data stage1 logits logits-status verify stage2 own control sweep domain eval measure compare runs chat serve demo demo-teacher demo-student demo-distilled demo-before demo-live demo-seeds test test-machines torture lint bench fidelity evidence clean
.DEFAULT_GOAL := help

define doors
printf '%s\n' 'Where to begin:' \
  '  nothing of your own:     make demo' \
  '  your own rows:           make data NAME=mine SOURCE=mine.jsonl STUDENT=Qwen/Qwen2.5-0.5B-Instruct' \
  '  prompts alone, which a teacher answers: the same with ARGS="--answers teacher --teacher Qwen/Qwen2.5-7B-Instruct"' \
  'README.md, "Three doors", says how each goes on.'
endef
# what a stage reads, or else the three doors
needs = @test -e $(call one,$(1)) || { echo 'error: $(subst ','\'',$(1)) is missing'; $(doors); exit 1; }

help: ## this text
	@$(doors)
	@echo
	@echo "make TARGET [NAME=mydata SOURCE='a.parquet folder/ org/name' TEACHER=... STUDENT=... CHUNK=all|val|3 K=16 T=2 ALPHA=0.9 GPUS=4 ARGS='more flags' RECIPE=...]"
	@echo "more flags for one target alone, on a line of several: DATA_ARGS STAGE1_ARGS LOGITS_ARGS STAGE2_ARGS CONTROL_ARGS (unset: STAGE2_ARGS) OWN_ARGS (unset: STAGE2_ARGS) ANSWERS_ARGS (unset: DATA_ARGS) DOMAIN_ARGS MEASURE_ARGS SCORE_ARGS; ARGS goes to every one"
	@echo "what is measured: MODELS='teacher base stage1 control stage2' (of what is there), SCORE= (no answers are written); where: DATA=data/NAME LOGITS=logits/NAME RUNS=runs/NAME CKPT=RUNS/stage2 TOKENIZER=STUDENT"
	@echo
	@sed -n 's/^\([a-z0-9-]*\):.*## /  \1 \t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 17

setup: .venv/ready ## .venv with pinned packages (no NVIDIA GPU? PIP="--extra-index-url https://download.pytorch.org/whl/cpu")
.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@
.venv/ready-test: requirements-test.txt .venv/ready
	$(INSTALL) -r requirements-test.txt
	touch $@

data: .venv/ready ## SOURCE -> data/NAME: token ids, masks, split
	$(if $(filter file,$(origin SOURCE)),$(if $(RECIPE),,$(call needs,$(SOURCE))))
	$(PY) prepare_data.py --source $(call some,$(SOURCE)) --tokenizer $(call one,$(TOKENIZER)) --out $(call one,$(DATA)) $(DATA_ARGS) $(ARGS)
	$(if $(word 2,$(MAKECMDGOALS)),,@echo 'next: make stage1 $(subst ','\'',$(again))')

stage1: .venv/ready ## fine-tune STUDENT on the teacher's answers -> runs/NAME/stage1
	$(call needs,$(DATA)/meta.json)
	$(TRAIN) stage1_sft.py --data $(call one,$(DATA)) --student $(call one,$(STUDENT)) --out $(call one,$(RUNS)/stage1) $(STAGE1_ARGS) $(ARGS)

logits: .venv/ready ## run TEACHER once -> logits/NAME (CHUNK=3: that chunk alone)
	$(call needs,$(DATA)/meta.json)
	$(PY) dump_logits.py --data $(call one,$(DATA)) $(TEACHER_IS) --student $(call one,$(STUDENT)) --out $(call one,$(LOGITS)) --chunk $(CHUNK) $(HOLDS) $(LOGITS_ARGS) $(ARGS)

logits-status: .venv/ready ## how far logits/NAME is, who is at work (LOGITS_ARGS=--shared of make logits: many workers), and until when
	$(call needs,$(DATA)/meta.json)
	$(PY) dump_logits.py --data $(call one,$(DATA)) --out $(call one,$(LOGITS)) --chunk $(CHUNK) --status

verify: .venv/ready ## every byte of DATA, LOGITS and RUNS that has a checksum (VERIFY=1000: and so many targets by TEACHER, again)
	$(PY) -m lib.files $(call there,$(DATA)) $(or $(call there,$(LOGITS)),$(foreach w,$(LOGITS),$(call there,$(lastword $(subst =, ,$(w)))))) $(call there,$(RUNS))
	$(if $(VERIFY),$(PY) dump_logits.py --data $(call one,$(DATA)) --teacher $(call one,$(TEACHER)) --out $(call one,$(LOGITS)) --chunk $(CHUNK) --verify $(VERIFY) $(ARGS))

stage2: .venv/ready ## distil the teacher's distribution into stage 1's student -> runs/NAME/stage2
	$(call needs,$(DATA)/meta.json)
	$(TRAIN) stage2_kd.py --data $(call one,$(DATA)) --logits $(call one,$(LOGITS)) --student $(call one,$(RUNS)/stage1) --out $(call one,$(RUNS)/stage2) --alpha "$(ALPHA)" --temperature "$(T)" $(STAGE2_ARGS) $(ARGS)

control: .venv/ready ## what stage 2 has to beat: stage 1 continued on the answers alone, for as many steps -> runs/NAME/control
	$(TRAIN) stage1_sft.py --data $(call one,$(DATA)) --student $(call one,$(RUNS)/stage1) --out $(call one,$(RUNS)/control) $(CONTROL_ARGS) $(ARGS)

own: .venv/ready ## a round on the student's own text: its answers to SOURCE's prompts, TEACHER's logits over them, stage 2 again (ROUND=2: from round 1) -> runs/NAME/own1
	$(call needs,$(DATA)/meta.json)
	$(PY) prepare_data.py --source $(call some,$(SOURCE)) --out $(call one,$(DATA)-$(OWN)) $(ANSWERS_ARGS) --val $(call one,$(DATA)) --answers student --student $(call one,$(RUNS)/$(BEFORE)) --generations $(GENERATIONS) $(ARGS)
	$(PY) dump_logits.py --data $(call one,$(DATA)-$(OWN)) $(TEACHER_IS) --student $(call one,$(RUNS)/$(BEFORE)) --out $(call one,$(LOGITS)-$(OWN)) --chunk $(CHUNK) $(HOLDS) $(LOGITS_ARGS)
	$(TRAIN) stage2_kd.py --data $(call one,$(DATA)-$(OWN)) --logits $(call one,$(LOGITS)-$(OWN)) --student $(call one,$(RUNS)/$(BEFORE)) --out $(call one,$(RUNS)/$(OWN)) --temperature "$(T)" $(OWN_ARGS)

sweep: .venv/ready ## stage 2 for every T and ALPHA (T="1 2 4" ALPHA="0.5 0.9") -> runs/NAME/sweep/T1-a0.5 ...; again: goes on where it was
	$(foreach t,$(T),$(foreach a,$(ALPHA),$(call sweep_run,$(t),$(a))))
	$(PY) -m lib.measure.runs $(call one,$(RUNS)/sweep)

define sweep_run
$(PY) stage2_kd.py --data $(call one,$(DATA)) --logits $(call one,$(LOGITS)) --student $(call one,$(RUNS)/stage1) --out $(call one,$(RUNS)/sweep/T$(subst ->,-,$(1))-a$(subst ->,-,$(2))) --alpha "$(2)" --temperature "$(1)" $(STAGE2_ARGS) $(ARGS)

endef

domain: .venv/ready ## into a domain in three stages, TEACHER beside STUDENT (START_STAGE=2 END_STAGE=3) -> runs/NAME/domain1 to domain3
	$(foreach s,$(wordlist $(START_STAGE),$(END_STAGE),1 2 3),$(call domain_stage,$(s),$(word $(s),0 1 2)))

define domain_stage
$(PY) stage2_kd.py --data $(call one,$(DATA)) --teacher $(call one,$(TEACHER)) --student $(call one,$(if $(filter 1,$(1)),$(DOMAIN_STUDENT),$(RUNS)/domain$(2))) --out $(call one,$(RUNS)/domain$(1)) $(DOMAIN$(1)) $(DOMAIN_ARGS) $(ARGS)

endef

eval: .venv/ready ## measure CKPT on the held-out rows -> CKPT-eval/eval.json
	$(PY) stage2_kd.py --data $(call one,$(DATA)) --logits $(call one,$(LOGITS)) --student $(call one,$(CKPT)) --out $(call one,$(CKPT)-eval) --eval-only $(ARGS)

measure: .venv/ready ## TEACHER, untouched STUDENT, stage1, control, stage2, on the held-out rows, with answers scored -> runs/NAME/*-eval
	$(foreach m,$(filter teacher base,$(MODELS)) $(foreach m,$(filter-out teacher base,$(MODELS)),$(if $(call there,$(RUNS)/$(m)/config.json),$(m))),$(call measure_one,$(m),$(if $(filter teacher,$(m)),$(TEACHER),$(if $(filter base,$(m)),$(STUDENT),$(RUNS)/$(m)))))

define measure_one
$(PY) stage2_kd.py --data $(call one,$(DATA)) --logits $(call one,$(LOGITS)) --student $(call one,$(2)) --out $(call one,$(RUNS)/$(1)-eval) --eval-only $(MEASURE_ARGS)
	$(if $(SCORE),$(PY) chat.py --ckpt $(call one,$(2)) --score $(call one,$(DATA)) --out $(call one,$(RUNS)/$(1)-eval/answers.jsonl) $(SCORE_ARGS))

endef
compare: .venv/ready ## teacher, student before and after, control: what is measured in runs/NAME -> runs/NAME/comparison.html .md .png .json
	$(PY) -m lib.measure.compare $(call one,$(RUNS)) --out $(call one,$(RUNS)/comparison) $(ARGS)

runs: .venv/ready ## all runs under runs/ with their best numbers (ARGS="--sort ce")
	$(PY) -m lib.measure.runs $(ARGS)

chat: .venv/ready ## talk to CKPT
	$(PY) chat.py --ckpt $(call one,$(CKPT)) $(ARGS)

serve: .venv/ready ## the page and OpenAI's API for CKPT, on http://127.0.0.1:8000 (ARGS="--teacher DIR": its teacher beside it)
	$(PY) chat.py --ckpt $(call one,$(CKPT)) --serve $(ARGS)

test: .venv/ready-test lint ## all tests (CPU, no network); ROOM=teacher: those of one room
	$(PY) -m pytest tests/$(ROOM) -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-machines: .venv/ready-test ## the tests that train, as other processors, libraries and numbers of threads run them (about 14 minutes on 2 cores)
	$(PY) tests/machines.py $(ARGS)

torture: .venv/ready-test ## kill, starve and disturb every stage ROUNDS=200 times, and hold what it leaves against an undisturbed run (ARGS="--stages dump --kinds twice")
	$(PY) tests/torture.py --rounds $(or $(ROUNDS),200) $(ARGS)

lint: .venv/ready-test ## ruff's rules, its format at 100 columns, and mypy on the core and the teacher
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/ready ## the promises about speed and memory, as ratios (about 10 minutes on 2 cores)
	$(PY) bench/speed/bench.py $(ARGS)

# --- docs/fidelity.md: what a record is worth, on real models. REAL holds smollm2, qwen05 and stdlib.parquet (docs/real-models.md)

REAL := real
F    := out/fidelity
# layers kept of the teacher: evenly spread (far: KL 2.9; for Qwen near: 0.8), and without the four in the middle
SMOL_FAR  := 0,1,2,3,5,6,7,8,9,10,12,13,14,15,16,17,19,20,21,22,23,24,26,27,28,29
SMOL_NEAR := 0,1,2,3,4,5,6,7,8,9,10,11,12,17,18,19,20,21,22,23,24,25,26,27,28,29
QWEN_NEAR := 0,1,2,4,5,6,7,8,10,11,12,13,15,16,17,18,19,21,22,23
QWEN_FAR  := 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19
DEMO_OUTCOME = $(PY) bench/fidelity/outcome.py --data data/demo --teacher runs/demo/teacher --student runs/demo/stage1 --k 4 --tail-rank 32 --tail-bytes 16 --steps 60 --val-rows 100 --tokens-per-step 2048 --lr 3e-3 --threads 1

fidelity: .venv/ready ## all measurements of docs/fidelity.md (REAL=real: the models; after `make demo`; about two hours on 2 CPU cores)
	$(PY) prepare_data.py --source $(REAL)/stdlib.parquet --tokenizer $(REAL)/smollm2 --out $(F)/data-smollm2 --max-len 200 --limit 400 --val 80
	$(PY) prepare_data.py --source $(REAL)/stdlib.parquet --tokenizer $(REAL)/qwen05 --out $(F)/data-qwen05 --max-len 200 --limit 400 --val 80
	$(PY) bench/fidelity/fidelity.py --data $(F)/data-smollm2 --teacher $(REAL)/smollm2 --student far=$(REAL)/smollm2:$(SMOL_FAR) --student near=$(REAL)/smollm2:$(SMOL_NEAR) --tried --out $(F)/smollm2
	$(PY) bench/fidelity/fidelity.py --data $(F)/data-qwen05 --teacher $(REAL)/qwen05 --student far=$(REAL)/qwen05:$(QWEN_FAR) --student near=$(REAL)/qwen05:$(QWEN_NEAR) --fewer --out $(F)/qwen05
	$(DEMO_OUTCOME) --out $(F)/outcome-demo-near
	$(DEMO_OUTCOME) --out $(F)/outcome-demo-far --keep-layers 1
	$(PY) bench/fidelity/outcome.py --data $(F)/data-smollm2 --teacher $(REAL)/smollm2 --student $(REAL)/smollm2 --keep-layers $(SMOL_FAR) --rows 110 --val-rows 24 --steps 16 --out $(F)/outcome-far
	$(PY) bench/fidelity/outcome.py --data $(F)/data-smollm2 --teacher $(REAL)/smollm2 --student $(REAL)/smollm2 --keep-layers $(SMOL_NEAR) --rows 110 --val-rows 24 --steps 16 --out $(F)/outcome-near
	$(PY) bench/fidelity/tables.py --results $(F) --doc docs/fidelity.md

# --- docs/on-policy.md: what the student's own text is worth, on the demo and on SmolLM2

SEEDS := 0 1 2
EVIDENCE = $(PY) bench/onpolicy/evidence.py --seeds $(SEEDS) --out out/onpolicy

evidence: .venv/ready ## all measurements of docs/on-policy.md (after `make demo-seeds`; REAL=real: smollm2 and stdlib.parquet; hours; goes on where it was)
	$(EVIDENCE) --setting demo $(ARGS)
	$(EVIDENCE) --setting smollm2 --real $(call one,$(REAL)) $(ARGS)
	$(PY) bench/onpolicy/evidence_tables.py --results bench/onpolicy/results-demo.json bench/onpolicy/results-smollm2.json --doc docs/on-policy.md

clean: ## remove what `make demo SEED=...` made in demo/, data/, logits/ and runs/
	rm -rf $(D) data/$(D) data/$(D)-teacher data/$(D)-own1 logits/$(D) logits/$(D)-own1 runs/$(D)

# --- the demo: the whole pipeline on embedded data, with a teacher made here

D := demo$(if $(filter-out 0,$(SEED)),-$(SEED))
DEMO_TRAIN := --beta2 0.99 --weight-decay 0.01 --warmup 0.05 --log-every 50 --sample-tokens 60 --no-pack --seed $(SEED)
DEMO_STUDENT := $(DEMO_TRAIN) --tokens-per-step 1024 --lr 3e-3 --eval-every 500
DEMO_STEPS := 1000
DEMO_MODELS := teacher stage1 control stage2 own1

demo: .venv/ready ## the whole pipeline on embedded data: about 5 minutes on 2 CPU cores (SEED=1 for another throw of the dice)
	$(PY) -m lib.prepare.demo --out $(D) --seed $(SEED)
	@echo; echo "=== the teacher: made from scratch by stage1_sft.py on much data; on the other core stage 1, a student several times smaller, on little of it, and its control"
	$(MAKE) --no-print-directory -j 2 demo-teacher demo-student
	@cat $(D)/prepare.log $(D)/stage1.log $(D)/control.log
	@echo; echo "=== the teacher's logits, once"
	$(PY) dump_logits.py --data data/$(D) --teacher runs/$(D)/teacher --student $(D)/student-config --out logits/$(D)
	@echo; echo "=== stage 2, and a round on the student's own text; on the other core teacher, stage 1 and control are measured"
	$(MAKE) --no-print-directory -j 2 demo-distilled demo-before
	@echo; echo "=== all five on the same held-out rows"
	$(MAKE) --no-print-directory -j 2 demo-eval-stage2 demo-eval-own1
	$(foreach m,$(DEMO_MODELS),$(call demo_score,$(m)))
	$(PY) -m lib.measure.compare $(foreach m,$(DEMO_MODELS),runs/$(D)/$(m)) --out runs/$(D)/comparison
	@echo "Talk to it, beside its teacher, on a page at http://127.0.0.1:8000: make serve NAME=$(D) CKPT=runs/$(D)/own1 ARGS=\"--teacher runs/$(D)/teacher\""
	@echo "or here: $(PY) chat.py --ckpt runs/$(D)/own1 --teacher runs/$(D)/teacher --prompt 'Ann has 38 apples. She buys 45 more. How many apples does Ann have now?'"

# what runs beside another command says it in a file
meanwhile = > $(1) 2>&1 || { tail -n 5 $(1); exit 1; }

demo-teacher:
	$(PY) prepare_data.py --source $(D)/teacher.parquet --tokenizer $(D)/tokenizer --out data/$(D)-teacher --val 200
	$(PY) stage1_sft.py --data data/$(D)-teacher --student $(D)/teacher-config --out runs/$(D)/teacher --lr 2.5e-3 --steps 1200 --eval-every 300 --tokens-per-step 1024 $(DEMO_TRAIN) --threads 1

# stage 1's student; and the control: stage 1 continued for as many steps as stage 2 takes. CE is lowest before a sum is learnt: best/ is the most often right
demo-student:
	$(PY) prepare_data.py --source $(D)/student.parquet --tokenizer $(D)/tokenizer --out data/$(D) --val 500 --show 1 $(call meanwhile,$(D)/prepare.log)
	$(PY) stage1_sft.py --data data/$(D) --student $(D)/student-config --out runs/$(D)/stage1 --steps 800 $(DEMO_STUDENT) --best acc1 --threads 1 $(call meanwhile,$(D)/stage1.log)
	$(PY) stage1_sft.py --data data/$(D) --student runs/$(D)/stage1 --out runs/$(D)/control --steps $(DEMO_STEPS) $(DEMO_STUDENT) --best acc1 --threads 1 $(call meanwhile,$(D)/control.log)

# stage 2; then the student's answers, also to prompts that have none, the teacher's logits over them, stage 2 again
demo-distilled:
	$(PY) stage2_kd.py --data data/$(D) --logits logits/$(D) --student runs/$(D)/stage1 --out runs/$(D)/stage2 --steps $(DEMO_STEPS) $(DEMO_STUDENT) --threads 1
	$(PY) prepare_data.py --source $(D)/student.parquet $(D)/prompts.parquet --out data/$(D)-own1 --val data/$(D) --answers student --student runs/$(D)/stage2 --max-new-tokens 80 --student-batch 512
	$(PY) dump_logits.py --data data/$(D)-own1 --teacher runs/$(D)/teacher --student runs/$(D)/stage2 --out logits/$(D)-own1
	$(PY) stage2_kd.py --data data/$(D)-own1 --logits logits/$(D)-own1 --student runs/$(D)/stage2 --out runs/$(D)/own1 --temperature 1 --steps $(DEMO_STEPS) $(DEMO_STUDENT)

demo-before:
	$(foreach m,teacher stage1 control,$(call demo_eval,$(m),$(call meanwhile,$(D)/$(m)-eval.log)))

demo-eval-%:
	$(call demo_eval,$*)

define demo_eval
$(PY) stage2_kd.py --data data/$(D) --logits logits/$(D) --student runs/$(D)/$(1) --out runs/$(D)/$(1)-eval --eval-only --threads 1 $(2)
	
endef

# answers are written one model after the other, for their speed is measured
define demo_score
$(PY) chat.py --ckpt runs/$(D)/$(1) --score data/$(D) --out runs/$(D)/$(1)-eval/answers.jsonl --max-new-tokens 80 --batch-size 250
	
endef

demo-live: .venv/ready ## after `make demo`: stage 2 once more, with the teacher live beside the student instead of its stored logits
	$(PY) stage2_kd.py --data data/$(D) --teacher runs/$(D)/teacher --student runs/$(D)/stage1 --out runs/$(D)/live --steps $(DEMO_STEPS) $(DEMO_STUDENT)
	$(call demo_eval,live)
	$(call demo_score,live)
	$(PY) -m lib.measure.compare runs/$(D) --out runs/$(D)/comparison-live

demo-seeds: .venv/ready ## the demo for each of SEEDS (0 1 2): the table of docs/demo.md
	$(foreach s,$(SEEDS),$(call demo_seed,$(s)))

define demo_seed
$(MAKE) demo SEED=$(1)

endef
