"""Time another library on prompts. The task is read from standard input as JSON.

Internal: `peers.time_peer` starts this module. It imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

#: Continues a prompt and returns the number of new tokens.
Continue = Callable[[list[int]], int]


def _llama_cpp(task: dict[str, Any]) -> Continue:
    library: Any = importlib.import_module("llama_cpp")
    longest = max(map(len, task["prompts"]))
    model = library.Llama(
        model_path=task["file"],
        n_ctx=longest + task["new_tokens"],
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        verbose=False,
    )
    ends = set(task["ends"])

    def run(prompt: list[int]) -> int:
        model.reset()  # otherwise a common beginning of two prompts is not computed again
        count = 0
        for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            count += 1
            if token in ends or count == task["new_tokens"]:
                break
        return count

    return run


def _openvino(task: dict[str, Any]) -> Continue:
    library: Any = importlib.import_module("openvino_genai")
    openvino: Any = importlib.import_module("openvino")
    numpy: Any = importlib.import_module("numpy")
    pipeline = library.LLMPipeline(task["file"], "CPU", INFERENCE_NUM_THREADS=task["threads"])
    config = library.GenerationConfig()
    config.max_new_tokens = task["new_tokens"]
    config.do_sample = False
    config.stop_token_ids = set(task["ends"])

    def run(prompt: list[int]) -> int:
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(prompt)), dtype=numpy.int64))
        made = pipeline.generate(library.TokenizedInputs(ids, mask), config)
        return len(made.tokens[0])

    return run


_LIBRARIES = {"llama.cpp": _llama_cpp, "openvino": _openvino}


def main() -> None:
    """Continue every prompt once, after a warm-up on the first one, and print the times."""
    task: dict[str, Any] = json.load(sys.stdin)
    run = _LIBRARIES[task["name"]](task)
    run(task["prompts"][0])
    found: dict[str, list[float]] = {"seconds": [], "cpu_seconds": [], "new_tokens": []}
    for prompt in task["prompts"]:
        start, cpu = time.perf_counter(), time.process_time()
        count = run(prompt)
        found["seconds"].append(time.perf_counter() - start)
        found["cpu_seconds"].append(time.process_time() - cpu)
        found["new_tokens"].append(count)
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
