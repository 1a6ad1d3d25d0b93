"""The Python API: mpirun -np 3 --hostfile hostfile.txt python examples/api.py [MODEL]

Every rank builds the `LLM`. The first goes on behind it; the others serve it in there.
"""

import sys

from mlx_dist import LLM
from mlx_dist.demo import MODEL_DIR

with LLM(sys.argv[1] if len(sys.argv) > 1 else str(MODEL_DIR)) as llm:
    for report in llm.reports:
        print(f"rank {report.rank} on {report.host}: layers {report.layers}")

    for text in llm.stream("A stage is", max_tokens=24):
        print(text, end="", flush=True)
    print()

    messages = [{"role": "user", "content": "What is a rank?"}]
    answer = llm.chat(messages, temperature=0.7, seed=1, max_tokens=64)
    print(answer.text, answer.finish_reason, answer.usage)

    # Greedy; with the likeliest two tokens of each position.
    answer = llm.generate("A slot is", max_tokens=4, num_logprobs=2)
    print([(token.token, token.logprobs.top) for token in answer.tokens])
