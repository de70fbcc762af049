"""Complete a prompt with transformers alone, as whoever gets the exported folder would.

python complete.py MODEL_FOLDER PROMPT
"""

import sys

import transformers


def main(folder: str, prompt: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(f"--- {folder}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
