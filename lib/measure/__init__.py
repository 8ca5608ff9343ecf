"""How good is it, and how near to its teacher?

prompts      chat.py --prompts and --score: answers to a file of prompts, continued after a kill
score        exact match, BLEU, ROUGE, accuracy and F1, with intervals and a paired test
labels       the likelihood of labels as answers
results      what was measured of a model, read from its folders
runs         the list of runs (make runs)
compare      teacher, student before and after, control: the comparison (make compare)
entries      ... which evaluations it compares, and which of them is the teacher
page         ... as one HTML file, by comparison.html.jinja
panels       ... its pictures
plots        curves.png of a run, report.png of a data set
"""
