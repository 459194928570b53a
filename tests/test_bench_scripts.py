"""The scripts of tests/bench that count on the inside of the project: that what they count is still there."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent / "bench"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(code: str, folder: Path) -> list[str]:
    """In a process of its own: the scripts look at all that is alive in theirs."""
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); folder = {str(folder)!r}; SMALL = {SMALL}\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def test_loading_writes_a_checkpoint_of_about_the_size_asked_for(tmp_path):
    code = """
import loading, mini_forge
from pathlib import Path
loading.CONFIG |= SMALL
print(loading.write_checkpoint(Path(folder), 0.0001))
print(sum(p.numel() for p in mini_forge.load_model(folder).parameters()))
"""
    size, numbers = map(int, run(code, tmp_path))
    assert 80_000 < size == 2 * numbers < 120_000


def test_the_census_finds_one_backbone_and_every_copy(tmp_path):
    """Also where matrices stay in bfloat16, as stored, and are no parameters."""
    code = """
import loading, mini_forge, ppo_study
from pathlib import Path
from mini_forge.providers import PROVIDERS
loading.CONFIG |= SMALL
loading.write_checkpoint(Path(folder), 0.00005)
model = mini_forge.load_model(folder, ops=PROVIDERS["unsloth"]("cpu").ops)
for _ in range(2):
    found = ppo_study.census(folder)
    print(found["decoders"], found["numbers"] == found["expected"], found["copies"])
    copy = model.model.layers[0].mlp.up_proj.weight.clone().float()
"""
    assert run(code, tmp_path) == ["1 True 0", "1 True 1"]
