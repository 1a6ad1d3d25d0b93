"""The same prompts by every way of the Python API, as JSON."""

import json
import threading

from mlx_dist import LLM
from mlx_dist.demo import MODEL_DIR
from mlx_dist.params import Params

PROMPTS = ["Rank 0 is", "A stage is", "The fabric"]
CHAT = [{"role": "user", "content": "What is a stage?"}]

with LLM(str(MODEL_DIR), batching="fixed:2,2,64") as llm:
    answers = {
        "generate": llm.generate(PROMPTS[0], max_tokens=12).text,
        "stream": "".join(llm.stream(PROMPTS[0], max_tokens=12)),
        "chat": llm.chat(CHAT, max_tokens=12).text,
    }

    def together():
        texts = ["" for _ in PROMPTS]
        under_way = [
            llm.chunks(llm.open(llm.tokenizer.encode_text(prompt), Params(12)))
            for prompt in PROMPTS
        ]
        for i, chunks in enumerate(under_way):
            texts[i] = "".join(chunk.piece.text for chunk in chunks)
        return texts

    answers["many"] = together()
    answers["many again"] = together()

    def in_a_thread():
        answers["chat in a thread"] = llm.chat(CHAT, max_tokens=12).text
        llm.drain()

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    llm.run()
    thread.join()
print(json.dumps(answers))
