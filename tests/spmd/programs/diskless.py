"""Answers with a model that each rank knows by another name: diskless.py FABRIC MODEL...

The first rank's model is for all that are not named. Prints a JSON object.
"""

import json
import os
import sys

from mlx_dist import LLM
from mlx_dist.model.grammar import json_grammar

fabric, *models = sys.argv[1:]
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
with LLM(
    models[rank] if rank < len(models) else models[0],
    fabric=fabric,
    weights="leader",
    batching="fixed:1,1,64",
) as llm:
    answers = {
        "text": llm.generate("A rank is", max_tokens=24).text,
        # The last rank matches grammars, by the tokenizer's files.
        "json": llm.generate("A rank is", grammar=json_grammar(None), max_tokens=24).text,
    }
    answers["weights"] = [report.weights_bytes for report in llm.reports]
print(json.dumps(answers))
