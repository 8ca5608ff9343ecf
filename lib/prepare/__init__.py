"""For prepare_data.py: from any data set to data/NAME/.

sources      files and data sets -> conversations, by the names of their columns
places       where files lie: on this disk, on S3 and the like, on the hub
hub          data sets of the Hugging Face hub: find, download, push
kinds        what a file is by its first bytes: packed, encoded, or no data at all
formats      what a file holds: columns and records of parquet, arrow, csv, json, txt
schema       which column is the prompt, which the answer
templates    the chat template: the tokenizer's own, named or plain; its date, its arguments
conversations  what a row says, of any shape -> one conversation
asked        a file of prompts, with what is accepted as their answers (for chat.py)
rows         conversations -> token ids and masks, what is dropped and why
classes      rows that have a class each (--task classify)
workers      tokenizing in several processes, order kept
split        duplicates, and the division into train and val
answers      --answers teacher, student: answers written by a model; a teacher's are checked
own          ... the student's own: the token ids that it sampled, learnt as they are
questions    ... what is asked, of a model here or of a server
ask          ... a client of any OpenAI-compatible server
store        ... each answer kept exactly once, whatever is killed
quality      refusals, loops, near duplicates
export       the rows as a parquet data set for others
describe     meta.json and what is printed of it
demo         the problems, tokenizer and configs of `make demo`
"""
