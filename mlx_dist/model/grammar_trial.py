"""Compiles the JSON schemas of a grammar and says what is wrong with them, in a process of its own.

Run by `grammar.py`, for schemas of a few kB are known that overflow the compiler's stack or keep
it busy for ever. Here that ends this process and nothing else.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_CPU_S = 1
_MEMORY_BYTES = 1 << 30
# Half of what the threads that compile it again have, at least.
_STACK_BYTES = 4 << 20


def main() -> None:
    """The grammar and the limits come as JSON from stdin; what is wrong, or "", goes to stdout."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    # macOS does not enforce it.
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_compile, args=(json.load(sys.stdin),))
    thread.start()
    thread.join()


def _compile(task: dict[str, Any]) -> None:
    tokenizer, limits = LLTokenizer("byte"), LLParserLimits(**task["limits"])
    for grammar in task["grammars"]:
        if "json_schema" in grammar:
            alone = json.dumps({"grammars": [grammar]})
            matcher = LLMatcher(tokenizer, alone, log_level=0, limits=limits)
            matcher.compute_logit_bias()
            if matcher.is_error():
                print(json.dumps(matcher.get_error()))
                return
    print(json.dumps(""))


if __name__ == "__main__":
    main()
