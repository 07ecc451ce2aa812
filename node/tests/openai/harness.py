"""Evaluates a gateway with the `lm-eval` package, and compares every log-likelihood with what `hanse score` says.

    python harness.py http://127.0.0.1:8080/v1 MODEL TOKENIZER CASES.json

TOKENIZER is the model's folder. CASES.json is a list of {"context", "choices", "gold", "scores"}: texts, each of which may go on in
some ways; which way is right; and what `hanse score --json` says of the text with each of them.
"""

import json
import math
import sys
import tempfile

import lm_eval
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

url, model, folder, cases_file = sys.argv[1:5]
with open(cases_file) as file:
    cases = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(folder)

with tempfile.TemporaryDirectory() as scratch:
    data = f"{scratch}/cases.jsonl"
    with open(data, "w") as file:
        for case in cases:
            file.write(json.dumps({key: case[key] for key in ("context", "choices", "gold")}) + "\n")
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test",
        "target_delimiter": "",
    }
    choice = common | {
        "task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }
    generate = common | {
        "task": "generate", "output_type": "generate_until", "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[gold]}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "temperature": 0},
    }
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"model={model},base_url={url}/completions,tokenizer={folder},num_concurrent=4,max_length=512",
        tasks=[choice, generate], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
    )

compared = 0
for sample in results["samples"]["choice"]:
    case = cases[sample["doc_id"]]
    for choice, score, (told, _greedy) in zip(case["choices"], case["scores"], sample["filtered_resps"], strict=True):
        begins = len(tokenizer(case["context"])["input_ids"])
        expected = sum(score["logprobs"][begins:])
        # At most a dozen log-probabilities, each of which the gateway may round by 1e-5.
        if not math.isclose(float(told), expected, abs_tol=1e-4):
            sys.exit(f"{case['context']!r} + {choice!r}: {told}, and hanse score says {expected}")
        compared += 1
if compared != sum(len(case["choices"]) for case in cases):
    sys.exit(f"{compared} were compared")
if results["results"]["choice"]["acc,none"] != 1:
    sys.exit(f"the model takes nonsense for likely: {results['results']}")
for sample in results["samples"]["generate"]:
    (answer,) = sample["resps"][0]
    if not answer or "." in answer:
        sys.exit(f"an answer that ends before its stop text is expected: {sample}")
print("all is well")
