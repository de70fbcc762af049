"""Beginnings of texts as prompts: python prompts.py TRAIN.jsonl PROMPTS.jsonl COUNT

Of each text in turn one line is drawn, and the prompt is what stands from there to the next line's indentation; a text
gives as many prompts as it takes to have COUNT of them. The same input gives the same prompts.
"""

import json
import random
import sys

MOST_CHARACTERS = 120


def main(source: str, target: str, count: str) -> int:
    with open(source, encoding="utf-8") as file:
        texts = [text for line in file if (text := json.loads(line)["text"])]
    draw, prompts = random.Random(0), []
    while len(prompts) < int(count):
        text = draw.choice(texts)
        start = text.rfind("\n", 0, draw.randrange(len(text))) + 1
        prompt = text[start : start + MOST_CHARACTERS]
        if len(prompt.strip()) >= MOST_CHARACTERS // 2:
            prompts.append(prompt)
    with open(target, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
