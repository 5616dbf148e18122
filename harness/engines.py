"""Real llama.cpp engines on a small random-weights model: no download, no compiler, no GPU.

    async with engines(2, slots=4, context=4096) as urls:
        ...  # two OpenAI-compatible workers, each with its own KV cache

Needs the dependency group ``engine``: ``pip install -e . --group engine``.
"""

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from yarl import URL

from aiohttp_smg_routing.testing import free_ports

from .engine import require_engine, run_engine
from .processes import answering, command, local_url, together

# About 13 million parameters: 14 MB that a CPU core reads fast enough to chat with.
_WIDTH, _BLOCKS, _HEADS, _KV_HEADS, _FEED_FORWARD = 512, 4, 8, 4, 1536
_MAX_CONTEXT = 32768
_BLOCK = 32  # weights of a block of Q8_0
_DEVIATION = (127 * 128 / 3) ** 0.5  # the standard deviation of a whole number from -127 to 127
_SPEAKABLE = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789")
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@asynccontextmanager
async def engines(
    count: int, *, slots: int, context: int, threads: int = 1, model: Path | None = None
) -> AsyncIterator[tuple[URL, ...]]:
    """Run ``count`` workers with cold caches until the block ends; yield their URLs.

    Each worker serves ``slots`` conversations at once, each of up to ``context`` tokens (one byte
    of text is one token), and keeps as many in its KV cache: a further conversation displaces the
    one that was idle longest. ``threads`` is the number of CPU threads of each worker; ``model`` is
    a file that ``write_model()`` wrote, or None to have one written. Raises
    ``ModuleNotFoundError`` that names what to install, and ``RuntimeError`` when a worker
    does not start.
    """
    require_engine()
    with ExitStack() as stack:
        if model is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="engines-"))
            model = Path(folder, "model.gguf")
            # On this thread, though it takes half a second: a thread of its own could not be
            # cancelled, and would write into a folder that is being removed.
            write_model(model)
        size = {"slots": slots, "context": context, "threads": threads}
        urls = tuple(map(local_url, free_ports(count)))
        workers = [
            answering(url / "health", *command(run_engine, model=str(model), port=url.port, **size))
            for url in urls
        ]
        async with together(workers):
            yield urls


def write_model(path: Path, *, seed: int = 7, blocks: int = _BLOCKS) -> None:
    """Write a Llama model with random weights and one token per byte to ``path``, as GGUF.

    Its size, and the time that a token costs, grow with the number of transformer ``blocks``.

    The output rows of all tokens but ``[a-z0-9]`` are zero. A greedy reply (``temperature`` 0) is
    therefore exactly ``max_tokens`` such characters: it never ends early, and sent back in the next
    turn it becomes the tokens that it came from, so that the KV cache covers it too.
    """
    require_engine()
    import gguf
    import numpy as np

    alphabet = _byte_alphabet()
    tokens = [*alphabet, *_CONTROL_TOKENS]
    tokens += [f"<|pad{number}|>" for number in range(-len(tokens) % 32)]
    kinds = [gguf.TokenType.NORMAL] * len(alphabet)
    kinds += [gguf.TokenType.CONTROL] * len(_CONTROL_TOKENS)
    kinds += [gguf.TokenType.UNUSED] * (len(tokens) - len(kinds))

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(_MAX_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp refuses a vocabulary without merges; no text has these two bytes side by side.
    writer.add_token_merges([f"{alphabet[0]} {alphabet[0]}"])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHAT_TEMPLATE)

    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int, silent: Sequence[int] = ()) -> None:
        # A block of Q8_0 is a scale and 32 signed bytes. Drawn as bytes, all matrices together
        # take a sixth of the time that floats take to be drawn and quantized.
        shape = rows, columns // _BLOCK
        drawn = np.empty(shape, [("scale", "<f2"), ("weights", np.int8, _BLOCK)])
        drawn["scale"] = 1 / (_DEVIATION * columns**0.5)
        drawn["weights"] = random.integers(-127, 128, (*shape, _BLOCK), np.int8)
        drawn[list(silent)] = 0
        writer.add_tensor(name, drawn.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(_WIDTH, np.float32))

    kv_width = _WIDTH // _HEADS * _KV_HEADS
    matrix("token_embd.weight", len(tokens), _WIDTH)
    silent = [token for token in range(len(tokens)) if token not in _SPEAKABLE]
    matrix("output.weight", len(tokens), _WIDTH, silent)
    norm("output_norm.weight")
    for block in (f"blk.{number}." for number in range(blocks)):
        norm(f"{block}attn_norm.weight")
        matrix(f"{block}attn_q.weight", _WIDTH, _WIDTH)
        matrix(f"{block}attn_k.weight", kv_width, _WIDTH)
        matrix(f"{block}attn_v.weight", kv_width, _WIDTH)
        matrix(f"{block}attn_output.weight", _WIDTH, _WIDTH)
        norm(f"{block}ffn_norm.weight")
        matrix(f"{block}ffn_gate.weight", _FEED_FORWARD, _WIDTH)
        matrix(f"{block}ffn_up.weight", _FEED_FORWARD, _WIDTH)
        matrix(f"{block}ffn_down.weight", _WIDTH, _FEED_FORWARD)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each byte, in the order of the bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
