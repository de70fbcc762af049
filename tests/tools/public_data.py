"""Small files in the formats of the public Dolly and OpenAssistant releases, with texts of our own."""

import gzip
import json

CITIES = ["Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Tokyo", "Quito", "Sofia", "Riga", "Doha", "Minsk"]


def dolly(path, rows=60):
    """databricks-dolly-15k.jsonl: instruction, context, response, category."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            city = CITIES[n % len(CITIES)]
            context = f"{city} has {n} bridges[{n}] and a café.\n" if n % 3 == 0 else ""
            row = {
                "instruction": f"Name the city with number {n}." if n % 2 else f"How many bridges are in {city}? ",
                "context": context,
                "response": f"The city is {city}." if n % 2 else f"There are {n} bridges in {city}.",
                "category": "closed_qa" if context else "open_qa",
            }
            file.write(json.dumps(row) + "\n")
    return path


def message(identity, role, text, replies=(), **more):
    return {
        "message_id": identity, "text": text, "role": role, "lang": more.pop("lang", "en"), "review_count": 3,
        "review_result": True, "deleted": more.pop("deleted", False), "rank": more.pop("rank", None),
        "synthetic": False, "model_name": None, "emojis": {"+1": 1}, "replies": list(replies), **more,
    }  # fmt: skip


def rated(quality, **others):
    values = {"spam": 0.0, "quality": quality, "toxicity": 0.0, **others}
    return {name: {"value": value, "count": 3} for name, value in values.items()}


def tree(n):
    """One tree: two rated replies, the second better; it is answered, and the answer is asked about again."""
    city = CITIES[n % len(CITIES)]
    worse = message(f"{n}-a", "assistant", f"{city} is a place.", rank=1, labels=rated(0.3))
    ending = message(f"{n}-q2", "prompter", "Thank you!")
    deeper = message(f"{n}-c", "assistant", f"It lies far from {CITIES[(n + 1) % len(CITIES)]}.", [ending],
                     labels=rated(0.9, humor=0.5))  # fmt: skip
    asked = message(f"{n}-q1", "prompter", "And where is it?", [deeper])
    gone = message(f"{n}-d", "assistant", "spam", rank=None, deleted=True)
    better = message(f"{n}-b", "assistant", f"{city} is a city that I like.", [asked], rank=0, labels=rated(1.0))
    root = message(f"{n}-r", "prompter", f"What is {city}?", [worse, better, gone], lang="en" if n % 4 else "de")
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def trees(path, count=40):
    """2023-04-12_oasst_ready.trees.jsonl.gz"""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(tree(n)) + "\n" for n in range(count)))
    return path


def flat(count=40):
    """The same as rows of messages with parents, as in *.messages.jsonl.gz."""
    rows = []

    def walk(node, parent, identity):
        own = {key: value for key, value in node.items() if key != "replies"}
        rows.append({**own, "parent_id": parent, "message_tree_id": identity, "tree_state": "ready_for_export"})
        for reply in node["replies"]:
            walk(reply, node["message_id"], identity)

    for n in range(count):
        walk(tree(n)["prompt"], None, f"{n}-r")
    return rows


def messages(path, count=40):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in flat(count)))
    return path


def parquet(path, count=40):
    """The Parquet files of the dataset's page: labels and emojis are columns of lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for row in flat(count):
        labels = row.pop("labels", None)
        row.pop("emojis")
        row["labels"] = labels and {
            "name": list(labels),
            "value": [entry["value"] for entry in labels.values()],
            "count": [entry["count"] for entry in labels.values()],
        }
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
