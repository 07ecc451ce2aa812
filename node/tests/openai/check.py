"""Asks a gateway with the `openai` package, and checks what comes.

    python check.py http://127.0.0.1:8080/v1 MODEL SCORES.json

SCORES.json maps texts to what `hanse score --json` says of them.
"""

import json
import sys

import openai

url, model, scores = sys.argv[1:4]
client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
PROMPT = "Once upon a time, there was a little fox"
MESSAGES = [{"role": "user", "content": PROMPT}]


def check(condition, *said):
    if not condition:
        sys.exit(f"line {sys._getframe(1).f_lineno}: {said}")


def models():
    names = [entry.id for entry in client.models.list()]
    check(names == [model], names)
    check(client.models.retrieve(model).owned_by == "hanse")


def chat():
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=30, temperature=0)
    choice = answer.choices[0]
    check(choice.finish_reason == "length" and answer.usage.completion_tokens == 30, answer)
    parts = [{"type": "text", "text": PROMPT}]
    same = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], max_completion_tokens=30, temperature=0
    )
    check(same.choices[0].message.content == choice.message.content, same)
    return choice.message.content


def streaming(expected):
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=30, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check(text == expected, text, expected)
    check(chunks[-1].usage.completion_tokens == 30, chunks[-1])


def logprobs(expected):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=30, temperature=0, logprobs=True, top_logprobs=3
    )
    told = answer.choices[0].logprobs.content
    check(b"".join(bytes(token.bytes) for token in told).decode() == expected, told)
    for token in told:
        check(len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob <= 0, token)


def tools():
    feed = {
        "type": "function",
        "function": {
            "name": "feed",
            "description": "Feeds an animal",
            "parameters": {
                "type": "object",
                "properties": {"animal": {"type": "string", "enum": ["fox", "owl"]}, "often": {"type": "boolean"}},
                "required": ["animal", "often"],
                "additionalProperties": False,
            },
        },
    }
    for stream in [False, True]:
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, tools=[feed], tool_choice={"type": "function", "function": {"name": "feed"}},
            max_tokens=300, temperature=1, seed=5, stream=stream,
        )
        if stream:
            chunks = list(answer)
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            check(chunks[-1].choices[0].finish_reason == "tool_calls", chunks[-1])
        else:
            calls = answer.choices[0].message.tool_calls
            check(answer.choices[0].finish_reason == "tool_calls", answer)
        check(len(calls) == 1 and calls[0].function.name == "feed", calls)
        arguments = json.loads(calls[0].function.arguments)
        check(arguments["animal"] in ("fox", "owl") and isinstance(arguments["often"], bool), arguments)


def schema():
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=400, temperature=1, seed=2,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "fox",
                "strict": True,
                "schema": {
                    "$defs": {"Colour": {"type": "string", "enum": ["red", "grey"]}},
                    "type": "object",
                    "properties": {"colour": {"$ref": "#/$defs/Colour"}, "age": {"type": "integer", "maximum": 99}},
                    "required": ["colour", "age"],
                    "additionalProperties": False,
                },
            },
        },
    )
    fox = json.loads(answer.choices[0].message.content)
    check(fox["colour"] in ("red", "grey") and isinstance(fox["age"], int), fox)


def errors():
    for wrong, error, code in [
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ({"messages": [{"role": "user", "content": "fox " * 2000}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": 9}, openai.BadRequestError, None),
    ]:
        try:
            client.chat.completions.create(**{"model": model, "messages": MESSAGES, "max_tokens": 4, **wrong})
        except error as found:
            check(found.code == code and found.message, found)
        else:
            check(False, wrong)


def cancel():
    stream = client.completions.create(model=model, prompt=PROMPT, max_tokens=450, logit_bias={"0": -100}, stream=True)
    for _, _ in zip(range(3), stream):
        pass
    stream.close()
    check(chat(), "served after one has gone")


def scoring():
    """As evaluation harnesses score: what a text costs, and which of two endings is likelier."""
    with open(scores) as file:
        expected = json.load(file)
    for text, score in expected.items():
        answer = client.completions.create(model=model, prompt=text, max_tokens=0, echo=True, logprobs=1)
        told = answer.choices[0].logprobs
        check(answer.choices[0].text == text, answer)
        check(told.token_logprobs[0] is None and score["logprobs"][0] is None, told)
        for ours, theirs in zip(told.token_logprobs[1:], score["logprobs"][1:], strict=True):
            check(abs(ours - theirs) < 1e-5, ours, theirs)
        for token, logprob, top in zip(told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
            ((best, value),) = top.items()
            check(value >= logprob and (best != token or value == logprob), token, top)


models()
answer = chat()
streaming(answer)
logprobs(answer)
tools()
schema()
errors()
cancel()
scoring()
print("all is well")
