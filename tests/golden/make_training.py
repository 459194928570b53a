"""Golden training: ten steps of a plain transformers+PEFT loop on a tiny Llama: dense, NF4, nested NF4.

Into golden/training: `base` (checkpoint and byte-level BPE tokenizer), `rows.jsonl`, `tokens.json` (the rows as the
Hugging Face tokenizer sees them), `init_adapter` (A and B both random, so that every gradient is at work from the first
step), and for each storage the per-step losses, gradient norms and the final adapter. `rslora_expected` has the logits
of the initial adapter when scaled by alpha/sqrt(r).

The loop is the textbook one, and what ours must equal: padded batch of all eight rows, float32, summed cross-entropy
over trained-on tokens divided by their number in the step, clipping, AdamW.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from make_families import randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PreTrainedTokenizerFast

TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320
SETTINGS = {"steps": 10, "learning_rate": 1e-3, "weight_decay": 0.001, "max_grad_norm": 0.3, "betas": [0.9, 0.999],
            "eps": 1e-8, "lr_scheduler_type": "constant", "lora_r": 4, "lora_alpha": 8}  # fmt: skip
NOISE_BOUND = 2e-6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STORAGES = {
    "dense": None,
    "nf4": {"bnb_4bit_use_double_quant": False},
    "nf4_nested": {"bnb_4bit_use_double_quant": True},
}


def chat(*contents: str, system: str | None = None) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


# 26 to 90 tokens, 5 to 35 of them trained on; one turn and several, with and without system, one line and many.
ROWS = [
    chat("What is two and three?", "five"),
    chat("Name the colour of the sky.", "The sky is blue."),
    chat("Count to four.", "one\ntwo\nthree\nfour"),
    chat("Is seven prime?", "Yes.", "Is eight prime?", "No, eight is two times four."),
    chat("Who are you?", "A very small model.", system="You are brief."),
    chat("Spell the word model.", "m o d e l", "And the word sky?", "s k y", "Thanks!", "You are welcome."),
    chat("A train leaves at nine and arrives at noon. How long is the journey, in hours?",
         "From nine to noon is three hours.\nThe journey takes 3 hours.\n#### 3"),
    chat("Schreibe: grün, weiß, 日本.", "grün, weiß, 日本 🙂", system="Answer in the user's language."),
]  # fmt: skip


def main(golden: Path):
    training = golden / "training"
    shutil.rmtree(training, ignore_errors=True)
    base = training / "base"
    make_tokenizer(base)
    make_base(base)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (training / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = tokenise(AutoTokenizer.from_pretrained(base), ROWS)
    (training / "tokens.json").write_text(json.dumps(rows).replace("}, ", "},\n ") + "\n")
    make_adapter(base, training / "init_adapter")
    make_rslora(base, training, rows)
    for storage, quantization in STORAGES.items():
        losses = run_reference(base, training, storage, quantization, rows)
        print(f"training/{storage}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def make_tokenizer(folder: Path):
    """A byte-level BPE tokenizer whose pad token is its end token, as many checkpoints have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    roles = ["system\n", "user\n", "assistant\n"] * len(ROWS)
    contents = [message["content"] for row in ROWS for message in row["messages"]]
    tokenizer.train_from_iterator(contents + roles, trainer)
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<|endoftext|>", **specials)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def make_base(folder: Path):
    """Every linear layer reads a multiple of 64 channels, a whole number of 4-bit blocks: for others bitsandbytes
    0.50.2 dequantises on the CPU as if each row began a new block, which is not what it quantised."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed=1, gain=1.0)
    # The head is the embedding: at N(0, 1) the loss would start at 20 nats, far from where models are trained.
    model.model.embed_tokens.weight.data *= 0.15
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()


def tokenise(tokenizer, rows: list[dict]) -> list[dict]:
    """`ids` of each rendered row, and `is_trained`: 1 on every assistant turn and its end token, not the line break
    after it. The row is tokenised once; turns are found as character spans by rendering ever longer prefixes."""
    out = []
    for row in rows:
        messages = row["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
                after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
                assert text.startswith(before) and text.startswith(after)
                spans.append((len(before), len(after.rstrip("\n"))))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        is_trained = [int(any(a < end and b > start for start, end in spans)) for a, b in encoded["offset_mapping"]]
        out.append({"ids": encoded["input_ids"], "is_trained": is_trained})
    return out


def load_base(base: Path, quantization: dict | None = None):
    options = {}
    if quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **quantization
        )
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)


def make_adapter(base: Path, folder: Path):
    """PEFT's own files; A as PEFT initialises it, B random too (std 0.05, so that ΔW is a tenth of W)."""
    torch.manual_seed(3)
    lora = LoraConfig(r=SETTINGS["lora_r"], lora_alpha=SETTINGS["lora_alpha"], target_modules=TARGETS,
                      lora_dropout=0.0, task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(load_base(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    save_adapter(model, folder)


def save_adapter(model, folder: Path):
    """`save_pretrained` without the model card, this machine's path to the base, and a set's order of modules."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text()) | {"base_model_name_or_path": "base", "target_modules": sorted(TARGETS)}
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def make_rslora(base: Path, training: Path, rows: list[dict]):
    """Logits with the initial adapter scaled by alpha/sqrt(r) = 4 instead of alpha/r = 2."""
    config = LoraConfig.from_pretrained(training / "init_adapter")
    config.use_rslora = True
    model = PeftModel.from_pretrained(load_base(base), training / "init_adapter", config=config).eval()
    input_ids = torch.tensor([rows[1]["ids"][-16:]])
    tensors = {"input_ids": input_ids, "logits": model(input_ids).logits}
    save_file(tensors, training / "rslora_expected.safetensors")


def run_reference(base: Path, training: Path, storage: str, quantization: dict | None, rows: list[dict]) -> list[float]:
    """Train, save what happened, return the losses."""

    def start():
        model = load_base(base, quantization)
        return PeftModel.from_pretrained(model, training / "init_adapter", is_trainable=True).train()

    model, other = start(), start()
    losses, norms = train(model, [pad(rows)])
    train(other, [pad([row]) for row in rows])
    check_noise(get_peft_model_state_dict(model), get_peft_model_state_dict(other))
    folder = training / storage
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    record = {"settings": SETTINGS, "losses": losses, "grad_norms": norms}
    (folder / "expected.json").write_text(json.dumps(record, indent=1) + "\n")
    return losses


def check_noise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    """The same training with sums in another order must end a tenth of the tests' bound away at most.

    Adam turns a gradient that is zero but for rounding into whole steps, so one such element would make the golden
    adapter a matter of chance. Then another seed is needed."""
    noise = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert noise < NOISE_BOUND, f"row by row, the adapter ends {noise:.1e} away: choose another seed in make_adapter"


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T) int64, padded on the right; labels -100 where nothing is learnt."""
    T = max(len(row["ids"]) for row in rows)
    batch = {key: torch.full((len(rows), T), fill) for key, fill in
             (("input_ids", 2), ("attention_mask", 0), ("labels", -100))}  # fmt: skip
    for i, row in enumerate(rows):
        ids, n = torch.tensor(row["ids"]), len(row["ids"])
        batch["input_ids"][i, :n], batch["attention_mask"][i, :n] = ids, 1
        batch["labels"][i, :n] = torch.where(torch.tensor(row["is_trained"]).bool(), ids, -100)
    return batch


def train(model, microbatches: list[dict[str, torch.Tensor]]) -> tuple[list[float], list[float]]:
    """The reference loop. Returns each step's loss before its update, and its gradient's norm before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"],
                                  betas=SETTINGS["betas"], eps=SETTINGS["eps"])  # fmt: skip
    trained_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in microbatches)
    losses, norms = [], []
    for _ in range(SETTINGS["steps"]):
        losses.append(0.0)
        for batch in microbatches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            labels = batch["labels"][:, 1:].flatten()
            total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
            (total / trained_tokens).backward()
            losses[-1] += total.item() / trained_tokens
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, SETTINGS["max_grad_norm"]).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms
