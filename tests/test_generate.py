"""Generation: greedy paths by hand, cached against uncached, sampling by frequency, streaming, and chat."""

import math

import pytest
import torch

from mini_forge.data.chat import choose_template
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.inference.chat import chat_loop
from mini_forge.inference.generate import TextStream, evaluating, generate, sample, spelled_end, until
from mini_forge.model.cache import KVCache, Memory, read_prompts
from tests.fake_model import TableModel, chain, says
from tests.tiny import random_model
from tests.toy_tokenizer import byte_level, pieces


def test_greedy_follows_the_likeliest_path():
    """1 → 2 → 3 → 4 → 1 …"""
    model = chain(6, _1=2, _2=3, _3=4, _4=1)
    assert generate(model, [[1], [5, 3]], max_new_tokens=5) == [[2, 3, 4, 1, 2], [4, 1, 2, 3, 4]]


def test_a_stop_token_ends_its_row_alone_and_is_not_returned():
    model = chain(6, _1=2, _2=3, _3=4, _4=1)
    assert generate(model, [[2], [4], [3]], max_new_tokens=3, stop_ids=[4]) == [[3], [1, 2, 3], []]


def test_generation_ends_when_all_rows_have():
    model = chain(6, _1=2, _2=3)
    generate(model, [[1], [2]], max_new_tokens=50, stop_ids=[3])
    assert len(model.calls) == 2  # the prompts, and one token more for the first row


def test_the_last_token_is_not_run_through_the_model():
    model = chain(6, _1=2, _2=3, _3=1)
    generate(model, [[1]], max_new_tokens=3)
    assert len(model.calls) == 3  # the prompt, 2, 3; not the third new token


def test_positions_are_true_and_prompts_padded_on_the_right():
    model = chain(6, _1=2, _2=3, _3=1)
    generate(model, [[5, 5, 1], [2]], max_new_tokens=3)
    ids, positions = [call[0].tolist() for call in model.calls], [call[1].tolist() for call in model.calls]
    assert ids[0][1][0] == 2 and positions[0] == [[0, 1, 2], [0, 1, 2]]
    assert ids[1:] == [[[2], [3]], [[3], [1]]]
    assert positions[1:] == [[[3], [1]], [[4], [2]]]


def test_the_head_runs_only_on_each_rows_last_position():
    model = chain(6, _1=2, _2=3, _3=1)
    generate(model, [[5, 5, 1], [2]], max_new_tokens=3)
    assert model.heads == [(2, 1)] * 3


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}],
    ids=["full", "window"],
)
def test_cached_generation_of_unequal_prompts_equals_the_argmax_of_full_forward_passes(changes):
    model = random_model(seed=3, **changes)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 272, (length,), generator=draw).tolist() for length in (1, 13, 6, 7)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert generate(model, prompts, max_new_tokens=12) == expected


def test_room_in_a_cache_that_is_not_used_is_not_read():
    """However many tokens may still come, a token costs the same and no bit of it is another."""
    model, found = random_model(), []
    prompts, lengths = [[1, 2, 3, 4], [5, 6]], torch.tensor([4, 2])
    for capacity in (5, 500):
        cache = KVCache(model, 2, capacity)
        for layer in cache.layers:
            layer.key[:, 5:] = layer.value[:, 5:] = torch.nan
        with torch.no_grad():
            hidden = read_prompts(model, prompts, lengths, cache)
            after = model(torch.tensor([[7], [8]]), position=lengths[:, None], cache=cache)
        found.append(torch.cat((hidden, after[:, 0])))
    assert found[0].isfinite().all() and torch.equal(*found)


def test_a_text_that_goes_on_is_not_read_again():
    model, memory = chain(9, _1=2, _2=3, _3=4, _4=5, _7=1), Memory()
    assert generate(model, [[8, 1]], max_new_tokens=2, memory=memory) == [[2, 3]]
    assert generate(model, [[8, 1, 2, 3]], max_new_tokens=1, memory=memory) == [[4]]  # 3 was said, and not read
    assert generate(model, [[8, 1, 2, 7, 1]], max_new_tokens=1, memory=memory) == [[2]]  # another text from 7 on
    assert generate(model, [[8, 1]], max_new_tokens=1, memory=memory) == [[2]]  # all of it known; the last is read
    read = [(ids[0].tolist(), position[0].tolist()) for ids, position, _ in model.calls]
    assert read == [([8, 1], [0, 1]), ([2], [2]), ([3], [3]), ([7, 1], [3, 4]), ([1], [1])]
    with pytest.raises(ConfigError, match="^memory: is of one text, and there are 2 prompts"):
        generate(model, [[1], [2]], max_new_tokens=1, memory=memory)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4}],
    ids=["full", "window"],
)
def test_a_text_goes_on_as_if_it_were_read_anew(changes):
    """Longer and longer, so that the cache must grow; an earlier part of it changed; broken off amid a reply."""
    model, memory, text = random_model(**changes), Memory(), [1, 2, 3]
    for turn in range(4):
        [reply] = generate(model, [text], max_new_tokens=4, memory=memory)
        assert [reply] == generate(model, [text], max_new_tokens=4)
        text += [*reply, 5 + turn]
    text[4] = 1 + text[4] % 7
    assert generate(model, [text], max_new_tokens=4, memory=memory) == generate(model, [text], max_new_tokens=4)

    def leave(_, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[*text, 9, 9]], max_new_tokens=4, on_token=leave, memory=memory)
    text += [9, 8, 7]
    assert generate(model, [text], max_new_tokens=4, memory=memory) == generate(model, [text], max_new_tokens=4)


def test_each_token_is_reported_as_it_is_made():
    seen = []
    rows = generate(chain(6, _1=2, _2=3, _3=4), [[1], [3]], max_new_tokens=9, stop_ids=[0, 4],
                    on_token=lambda row, token: seen.append((row, token)))  # fmt: skip
    assert rows == [[2, 3], []]
    assert seen == [(0, 2), (0, 3)]


def test_allowed_restricts_the_next_token_of_its_row():
    """After 1 comes 2; row 0 may only take 4 or 5 first, of which 5 is liked better, and is free after that."""
    logits = torch.zeros(6, 6)
    logits[1, 2], logits[1, 5], logits[2, 3], logits[5, 1] = 10, 5, 10, 10

    def allowed(row, new):
        return [4, 5] if row == 0 and not new else None

    assert generate(TableModel(logits), [[1], [1]], max_new_tokens=2, allowed=allowed) == [[5, 1], [2, 3]]


def test_an_empty_list_of_allowed_tokens_ends_the_row():
    model = chain(6, _1=2, _2=3, _3=1)
    rows = generate(model, [[1], [2]], max_new_tokens=4, allowed=lambda row, new: [] if len(new) == 2 - row else None)
    assert rows == [[2, 3], [3]]


def test_generation_leaves_every_module_in_the_mode_it_was_in():
    model = chain(6, _1=2)
    model.train()
    model.dropout.eval()
    generate(model, [[1]], max_new_tokens=2)
    assert [training for _, _, training in model.calls] == [False, False]
    assert model.training and not model.dropout.training


def test_the_mode_is_restored_after_an_error_and_gradients_are_off_inside():
    model = chain(6).train()
    with pytest.raises(KeyError), evaluating(model):
        assert not torch.is_grad_enabled() and not model.dropout.training
        raise KeyError
    assert model.training and model.dropout.training and torch.is_grad_enabled()


def test_greedy_generation_leaves_the_global_random_state_alone():
    model = random_model()
    before = torch.get_rng_state()
    generate(model, [[1, 2], [3]], max_new_tokens=3)
    assert torch.equal(before, torch.get_rng_state())


def test_no_prompts_give_nothing():
    assert generate(chain(3), [], max_new_tokens=4) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="prompt: has no tokens"):
        generate(chain(3), [[1], []], max_new_tokens=4)


def test_options_out_of_range_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        generate(chain(3), [[1]], max_new_tokens=0, temperature=-1.0, top_k=-1, top_p=0.0)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "max_new_tokens", "temperature", "top_k", "top_p",
    ]  # fmt: skip
    for bad in ({"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 1.01}, {"top_p": math.nan}):
        with pytest.raises(ConfigError):
            generate(chain(3), [[1]], max_new_tokens=1, **bad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.zeros(4, 4)
    logits[2, 1] = value
    model = TableModel(logits)
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, [[3], [2]], max_new_tokens=2)


def frequencies(logits, n=20_000, **options):
    draws = sample(logits.expand(n, -1), generator=torch.Generator().manual_seed(0), **options)
    return draws.bincount(minlength=logits.shape[-1]) / n


# Of 20 000 draws a share p has deviation sqrt(p(1-p)/20000) <= 0.0036; 0.015 is four of them.
LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def test_plain_sampling_draws_from_the_softmax():
    assert torch.allclose(frequencies(LOGITS, temperature=1.0), LOGITS.exp(), atol=0.015)


def test_temperature_sharpens():
    """At temperature 1/2 probabilities are squared: 1, 16, 4, 9 of 30."""
    expected = torch.tensor([1, 16, 4, 9]) / 30
    assert torch.allclose(frequencies(LOGITS, temperature=0.5), expected, atol=0.015)


def test_temperature_zero_is_the_argmax():
    assert sample(LOGITS.expand(3, -1), 0.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_a_tiny_temperature_is_nearly_greedy_whatever_the_logits(temperature):
    for logits in (LOGITS, LOGITS * 1e6, LOGITS + 1e6, LOGITS.clone().index_fill_(0, torch.tensor([0]), -math.inf)):
        assert sample(logits.expand(50, -1), temperature, top_k=3, top_p=0.9).tolist() == [1] * 50
    ties = frequencies(torch.tensor([3.0, 1.0, 3.0]), temperature=temperature)
    assert torch.allclose(ties, torch.tensor([0.5, 0, 0.5]), atol=0.015)


def test_top_k_keeps_the_likeliest():
    expected = torch.tensor([0, 4 / 7, 0, 3 / 7])
    assert torch.allclose(frequencies(LOGITS, temperature=1.0, top_k=2), expected, atol=0.015)
    assert torch.allclose(frequencies(LOGITS, temperature=1.0, top_k=9), LOGITS.exp(), atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [0, 1, 0, 0]), (0.5, [0, 4 / 7, 0, 3 / 7]), (0.8, [0, 4 / 9, 2 / 9, 3 / 9]), (1e-9, [0, 1, 0, 0])],
)
def test_top_p_keeps_the_fewest_that_hold_so_much(top_p, kept):
    assert torch.allclose(frequencies(LOGITS, temperature=1.0, top_p=top_p), torch.tensor(kept) * 1.0, atol=0.015)


def test_top_p_counts_what_top_k_left():
    """Top 3 leaves 4, 3, 2 of 9; the first two hold 7/9 = 0.78, so top_p 0.75 keeps two, not three as of all."""
    expected = torch.tensor([0, 4 / 7, 0, 3 / 7])
    assert torch.allclose(frequencies(LOGITS, temperature=1.0, top_k=3, top_p=0.75), expected, atol=0.015)


def test_the_same_seed_draws_the_same_tokens_and_rows_do_not_wait_on_each_other():
    torch.manual_seed(0)
    model = TableModel(torch.randn(50, 50))

    def run(**options):
        generator = torch.Generator().manual_seed(5)
        return generate(model, [[1], [2]], max_new_tokens=20, temperature=1.0, generator=generator, **options)

    free = run()
    assert free == run()
    stop = free[0][3]
    ended = run(stop_ids=[stop])
    assert ended[0] == free[0][: free[0].index(stop)]
    assert ended[1] == free[1][: free[1].index(stop)] if stop in free[1] else ended[1] == free[1]


TEXTS = ["plain words, and more", "größer 日本語 €5 🙂🙃 end", "tab\tand\nline", "🙂"]


@pytest.mark.parametrize("make", [byte_level, pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_decoding_and_hold_no_half_character(tmp_path, make, text):
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in ids]
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == tokenizer.decode(ids) == text
    assert stream.finish() == "" and not stream.ended


def test_a_stream_ends_before_the_end_of_a_broken_character(tmp_path):
    tokenizer = byte_level(tmp_path)
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a€")
    assert "".join(stream.push(token) for token in ids[:-1]) == "a"
    assert stream.finish() == "\ufffd"


def test_a_stream_hides_the_end_it_is_told_of(tmp_path):
    tokenizer = byte_level(tmp_path)
    stream = TextStream(tokenizer, end="<|end|>")
    shown = []
    for token in tokenizer.encode("a < b <|en d <|end|> never"):
        shown.append(stream.push(token))
        if stream.ended:
            break
    assert "".join(shown) == "a < b <|en d "
    assert stream.finish() == ""


def test_a_stream_gives_back_what_only_began_like_the_end(tmp_path):
    tokenizer = byte_level(tmp_path)
    stream = TextStream(tokenizer, end="<|end|>")
    assert "".join(stream.push(token) for token in tokenizer.encode("a<|en")) == "a"
    assert stream.finish() == "<|en" and not stream.ended


def test_generation_stops_at_an_end_that_is_no_token(tmp_path):
    tokenizer = byte_level(tmp_path)
    template = choose_template("harmony", "some", tokenizer, "text-generation")
    end = spelled_end(template, tokenizer)
    assert end == "<|end|>"
    script = tokenizer.encode("four<|end|>and on")
    model = says(1, script, tokenizer.vocab_size)
    [row] = generate(model, [[7]], max_new_tokens=len(script), allowed=until(end, tokenizer))
    assert tokenizer.decode(row) == "four<|end|>"


def test_an_end_token_needs_no_spelling(tmp_path):
    tokenizer = byte_level(tmp_path)
    template = choose_template("chatml", "some", tokenizer, "text-generation")
    assert spelled_end(template, tokenizer) == "" and until("", tokenizer) is None


class Terminal:
    """Reads from a list of lines, which may hold an exception to raise, and keeps what is written."""

    def __init__(self, *lines):
        self.lines, self.text = list(lines), ""

    def read(self, prompt):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text="", end="\n", flush=False):
        self.text += text + end


def chat_with(tokenizer, model, *lines, template=None, system_prompt=None, max_new_tokens=20):
    terminal = Terminal(*lines)
    template = template or choose_template("chatml", "some", tokenizer, "text-generation")
    chat_loop(model, tokenizer, template, system_prompt, terminal.read, terminal.write, max_new_tokens=max_new_tokens)
    return terminal


def spelled(tokenizer, model, call):
    """The text that the model has read with one call, that of calls before it that it goes on with included."""
    seen = {}
    for ids, position, _ in model.calls[: call + 1]:
        seen |= zip(position[0].tolist(), ids[0].tolist(), strict=True)
    return tokenizer.decode([seen[place] for place in range(int(position.max()) + 1)], skip_special=False)


def echo(tokenizer, word, **options):
    """Says `word` and its end token after the end of a chatml prompt, wherever that is."""
    end = tokenizer.token_id("<|im_end|>")
    [newline], path = tokenizer.encode("\n"), tokenizer.encode(word)
    logits = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
    for before, after in zip([newline, *path], [*path, end], strict=True):
        logits[before, after] = 10.0
    return TableModel(logits, **options)


def prefills(model):
    return [i for i, call in enumerate(model.calls) if call[0].shape[1] > 1]


def test_chat_carries_the_conversation_on_in_the_template(tmp_path):
    tokenizer = byte_level(tmp_path)
    model = echo(tokenizer, "hey")
    terminal = chat_with(tokenizer, model, "hello", "", "good day", "/exit", system_prompt="Be brief.")
    assert terminal.text.splitlines()[1:] == ["hey", "hey"]
    first, second = prefills(model)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    one = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, model, first) == system + one
    two = "hey<|im_end|>\n<|im_start|>user\ngood day<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, model, second) == system + one + two
    read = [tokenizer.decode(model.calls[call][0][0].tolist(), skip_special=False) for call in (first, second)]
    assert read == [system + one, two.removeprefix("hey")]  # what was read, or said, is not read again


def test_chat_reset_forgets(tmp_path):
    tokenizer = byte_level(tmp_path)
    model = echo(tokenizer, "hey")
    chat_with(tokenizer, model, "hello", "/reset", "again")
    assert "hello" not in spelled(tokenizer, model, prefills(model)[1])


@pytest.mark.parametrize("leave", [EOFError(), KeyboardInterrupt(), "/exit"])
def test_chat_leaves_cleanly(tmp_path, leave):
    tokenizer = byte_level(tmp_path)
    terminal = chat_with(tokenizer, echo(tokenizer, "hey"), "hello", leave, "never read")
    assert terminal.lines == ["never read"]
    assert terminal.text.endswith("\n")


def test_ctrl_c_in_a_reply_leaves_cleanly(tmp_path):
    tokenizer = byte_level(tmp_path)
    model = echo(tokenizer, "hey")
    terminal = Terminal("hello", "never read")

    def write(text="", end="\n", flush=False):
        terminal.write(text, end)
        if flush and text:
            raise KeyboardInterrupt

    template = choose_template("chatml", "some", tokenizer, "text-generation")
    chat_loop(model, tokenizer, template, None, terminal.read, write, max_new_tokens=5)
    begun = tokenizer.decode(tokenizer.encode("hey")[:1])
    assert terminal.lines == ["never read"] and terminal.text.endswith(f"\n{begun}\n")


def test_chat_drops_the_oldest_turns_and_says_so(tmp_path):
    tokenizer = byte_level(tmp_path)
    length = len(tokenizer.encode("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"))
    model = echo(tokenizer, "hey", max_positions=2 * length + 8)
    terminal = chat_with(tokenizer, model, "one", "two", max_new_tokens=20)
    assert "oldest turns dropped: 1" in terminal.text
    last = spelled(tokenizer, model, prefills(model)[1])
    assert "one" not in last and "two" in last
    assert terminal.text.count("hey") == 2


def test_chat_refuses_a_message_longer_than_the_model_and_goes_on(tmp_path):
    tokenizer = byte_level(tmp_path)
    model = echo(tokenizer, "hey", max_positions=60)
    terminal = chat_with(tokenizer, model, "x " * 60, "one", max_new_tokens=20)
    assert "the model has 60: shorten it" in terminal.text
    [only] = prefills(model)
    assert spelled(tokenizer, model, only) == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert "hey" in terminal.text


def test_a_reply_never_runs_past_the_models_positions(tmp_path):
    tokenizer = byte_level(tmp_path)
    prompt = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    limit = len(tokenizer.encode(prompt)) + 3
    model = TableModel(torch.eye(tokenizer.vocab_size), max_positions=limit)  # repeats its last token for ever
    chat_with(tokenizer, model, "one", max_new_tokens=50)
    assert max(int(position.max()) for _, position, _ in model.calls) < limit


def test_chat_shows_no_space_before_and_no_spelled_end_behind_a_reply(tmp_path):
    """Templates may put a space before a response; the tokenizer may lack the end token of a template."""
    tokenizer = byte_level(tmp_path)
    template = choose_template("harmony", "some", tokenizer, "text-generation")
    prompt = template.render_prompt([{"role": "user", "content": "hello"}])
    script = tokenizer.encode(" four<|end|> and on")
    model = says(len(tokenizer.encode(prompt)), script, tokenizer.vocab_size)
    terminal = chat_with(tokenizer, model, "hello", template=template, max_new_tokens=len(script))
    assert terminal.text.splitlines()[1] == "four"
    unread = len(tokenizer.encode(" and on"))
    assert len(model.calls) == 1 + len(script) - unread  # the prompt and each token up to the end, none behind it


def test_chat_shows_what_only_began_like_the_end(tmp_path):
    tokenizer = byte_level(tmp_path)
    template = choose_template("harmony", "some", tokenizer, "text-generation")
    prompt = template.render_prompt([{"role": "user", "content": "hello"}])
    script = tokenizer.encode("four<|en")
    model = says(len(tokenizer.encode(prompt)), script, tokenizer.vocab_size)
    terminal = chat_with(tokenizer, model, "hello", template=template, max_new_tokens=len(script))
    assert terminal.text.splitlines()[1] == "four<|en"


def test_chat_checks_its_options_before_it_reads():
    with pytest.raises(ConfigError, match="top_p"):
        chat_loop(chain(3), None, None, None, lambda _: pytest.fail("read"), max_new_tokens=3, top_p=2.0)
