"""What a trainer can do without: one file an option, with its flags (add_flags, check_flags); a
script names it in a few lines, and no flat file knows it.

    lora         --lora-rank: adapters in PEFT's format
    mix          --mix: each source's share of the tokens, fixed or moving over the run
    sampling     --eval-sampling: shares that follow each source's val loss
    bysource     --divergence "given:fkl own:rkl": a method for each source
    onpolicy     --on-policy: rows that the student answers anew while it learns
    drift        ... and whether what it writes goes wrong over the run
    beside       losses beside the logits: hidden states, attention maps, whole rows
    capture      ... what is captured of a forward pass for them
    attention    ... the attention maps of chosen layers
    gradnorm     ... --balance: weights that make every loss pull alike
    classifier   models with a classification head (data of --task classify)
    ranks        several processes of torchrun that train one student
    shard        ... of which each holds a part of it
    tags         --tag: a run's folder named by method and date
    track        --track: the log in TensorBoard or Weights & Biases
    samples      samples.md: a few val prompts answered at every evaluation
"""
