"""Makes model/: a toy language model, pre-trained from nothing on Debian package descriptions, in ten minutes on a CPU.

    python configs/quickstart/make_model.py descriptions.txt        (see make_dataset.py for that text)

It is also an example of research code that imports mini_forge: a DecoderSpec for an architecture, a Decoder to train in
full, collate for padding-free batches, the summed token loss, a schedule and an optimizer.
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from make_dataset import Package, choose_rows, read_packages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mini_forge.data.batches import Batch, Document, collate
from mini_forge.data.chat import FORMATS
from mini_forge.io.merge import write_safetensors
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec
from mini_forge.training.optim import clip_grad_norm, make_optimizer, parameter_groups
from mini_forge.training.schedule import lr_at
from mini_forge.training.sft import sft_loss

HERE = Path(__file__).parent
START, END, STOP = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_SHARE = 0.25  # of the documents: enough that the template's tokens mean something
LONGEST = 256  # tokens of a document; the rest of it is cut
BATCH_TOKENS = 2048
STEPS = 1400  # of one batch each: 60 % of the text once
HELD_OUT = 300  # documents
PEAK_RATE, WEIGHT_DECAY, CLIP = 4e-3, 0.1, 1.0
SEED = 0

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
}


def pretraining_packages(packages: list[Package]) -> list[Package]:
    """The packages without those of the dataset, and every paragraph once: families of packages repeat theirs."""
    rows = choose_rows(packages)
    names, synopses = {row.name for row in rows}, {row.synopsis for row in rows}
    seen = set().union(*(row.shared_text for row in rows))
    kept = []
    for package in packages:
        fresh = tuple(p for p in package.paragraphs if p not in seen)
        if fresh and package.name not in names and package.synopsis not in synopses:
            kept.append(Package(package.name, package.synopsis, fresh))
            seen.update(fresh)
    return kept


def as_text(package: Package, is_chat: bool) -> str:
    """A document to pre-train on: synopsis and description, or a conversation. Never the task of the dataset."""
    if not is_chat:
        return f"{package.synopsis}\n\n{package.description}{STOP}"
    question = f"{START}user\nDescribe the package {package.name}.{END}\n"
    return f"{question}{START}assistant\n{package.description}{END}"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be spelled, and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[STOP, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[Document]:
    """Every token is trained on but the first of each document, which nothing precedes."""
    documents = []
    for line, encoding in enumerate(tokenizer.encode_batch(texts)):
        ids = np.array(encoding.ids[:LONGEST], dtype=np.int32)
        documents.append(Document(ids, np.arange(len(ids)) > 0, line))
    return documents


def batches(documents: list[Document]) -> list[Batch]:
    """Rows of about BATCH_TOKENS, whole documents in the order given."""
    rows, row, tokens = [], [], 0
    for document in documents:
        row.append(document)
        tokens += document.inputs
        if tokens >= BATCH_TOKENS:
            rows.append(collate(row))
            row, tokens = [], 0
    return rows


def initialise(model: Decoder):
    """Normal with std 1/√fan-in, 0.02 for the embedding; each block begins as the identity: its last matrix is 0."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=CONFIG["initializer_range"])
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def pretrain(model: Decoder, train: list[Batch], held_out: list[Batch]):
    """One pass over the batches, one optimizer step each; prints the curve, losses in nats a token."""
    groups = parameter_groups(model.named_parameters(), WEIGHT_DECAY)
    optimizer = make_optimizer("adamw_torch", groups, PEAK_RATE, WEIGHT_DECAY, "cpu")
    tokens, since, began = 0, [], time.perf_counter()
    print("step\ttokens\tloss\theld-out\ttokens/s")
    for step, batch in enumerate(train):
        rate = lr_at("cosine", step, len(train), len(train) // 20, PEAK_RATE)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):  # 1.6 times as fast where the CPU has AMX
            loss = sft_loss(model, batch)
        (loss.total / loss.count).backward()
        clip_grad_norm(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        tokens += loss.count
        since.append(loss.total.item() / loss.count)
        if (step + 1) % 100 == 0 or step + 1 == len(train):
            speed = tokens / (time.perf_counter() - began)
            mean, since = sum(since) / len(since), []
            print(f"{step + 1}\t{tokens:,}\t{mean:.4f}\t{mean_loss(model, held_out):.4f}\t{speed:,.0f}", flush=True)


@torch.no_grad()
def mean_loss(model: Decoder, held_out: list[Batch]) -> float:
    losses = [sft_loss(model, batch) for batch in held_out]
    return float(sum(loss.total for loss in losses)) / sum(loss.count for loss in losses)


def save(model: Decoder, tokenizer: Tokenizer, folder: Path):
    """The folder as Hugging Face lays it out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    entries = [(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()]
    write_safetensors(folder / "model.safetensors", entries, weights.values())
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(FORMATS["chatml"], encoding="utf-8")
    stop, end = (tokenizer.token_to_id(token) for token in (STOP, END))
    tokens = {"bos_token": None, "eos_token": END, "pad_token": STOP, "unk_token": None}
    config = {**CONFIG, "bos_token_id": None, "eos_token_id": end, "pad_token_id": stop}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [end, stop], "pad_token_id": stop})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
    )


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("descriptions", type=Path, help="apt's records, see make_dataset.py")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--threads", type=int, default=1, help="more are faster on an idle machine")
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer, to try things out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    dice = random.Random(SEED)

    packages = pretraining_packages(read_packages(arguments.descriptions.read_text(encoding="utf-8")))
    dice.shuffle(packages)
    texts = [as_text(package, dice.random() < CHAT_SHARE) for package in packages]
    tokenizer = train_tokenizer(texts)
    documents = tokenize(tokenizer, texts)
    train, held_out = batches(documents[HELD_OUT:])[: arguments.steps], batches(documents[:HELD_OUT])
    model = Decoder(decoder_spec(CONFIG))
    initialise(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(documents):,} documents, {sum(d.inputs for d in documents):,} tokens, {parameters:,} parameters")
    pretrain(model.train(), train, held_out)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
