"""Ask a vLLM engine for log-probabilities: a program for the Python of the environment that `make test-vllm` makes.

    python vllm_engine.py JOB ANSWERS

JOB is a file of `torch.save`: `{"engine": arguments of vllm.LLM, "prompts": {name: prompt}}`. A prompt that is a list
has the messages of a chat. ANSWERS is a file of the same kind, `{name: (token ids, log-probabilities)}`: those of a
prompt after its first token, with its placeholders expanded.
"""

import sys

import torch
from vllm import LLM, SamplingParams


def main(job: str, answers: str) -> None:
    asked = torch.load(job, weights_only=False)
    engine = LLM(**asked["engine"])
    found = {}
    for name, prompt in asked["prompts"].items():  # one by one, so that no answer depends on another prompt
        ask = engine.chat if isinstance(prompt, list) else engine.generate
        (output,) = ask(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        tokens, each = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
        logprobs = [candidates[token].logprob for token, candidates in zip(tokens, each, strict=True)]
        found[name] = tokens, torch.tensor(logprobs)
    torch.save(found, answers)


if __name__ == "__main__":  # a process that vLLM starts may import this file
    main(*sys.argv[1:])
