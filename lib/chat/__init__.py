"""For chat.py: one checkpoint, talked to in a terminal, on a page, through OpenAI's API.

model         a checkpoint that answers: its template, how it samples, what it has read already
talk          the conversation in a terminal
terminal      ... what is shown there, and what is typed
heat          student beside teacher at every token of an answer
text          an answer's text while it is written
engine        many answers at once, one thread a model
api           OpenAI's requests and answers
routes        what the server answers to, and whom
serve         the server
chat.html     the page
openapi.json  the API, to the last field
"""
