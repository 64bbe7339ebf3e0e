"""Train on long text over sequence-parallel ranks, step by step beside the unsharded model.

    torchrun --nproc-per-node 2 examples/train_long_context.py
    torchrun --nproc-per-node 4 examples/train_long_context.py --sp-size 2 --text book.txt --steps 50
    torchrun --nproc-per-node 8 examples/train_long_context.py --model meta-llama/Llama-3.2-1B --sequence 32768

First rank 0 trains the unsharded model alone. Then all ranks train the transformed model, from the same weights, on the
same batches, with the same loop: AdamW and gradient clipping, and `DistributedDataParallel` over the dp x sp grid. The
losses have to agree to 1e-4 at every step. (Over hundreds of steps, or with a learning rate at the edge of stability,
training amplifies the rounding of any two float32 runs beyond that.)
"""

from __future__ import annotations

import argparse
import copy
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from board import Board, Run
from launch import join_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from surgery import InputError, transform

TOLERANCE = 1e-4
MAX_GRADIENT_NORM = 1.0
NUM_BYTES = 256


def main() -> None:
    options = parse_options()
    with join_ranks() as ranks:
        torch.manual_seed(0)
        model, tokens = make_byte_llama(options) if options.model is None else load(options)
        model.to(ranks.device)
        reference = copy.deepcopy(model)
        model = transform(model, sp_size=options.sp_size or ranks.world_size)
        mpu = model.surgery.mpu
        batches = make_batches(tokens.to(ranks.device), options, mpu.get_data_parallel_world_size())
        mine, whole = batches[:, mpu.get_data_parallel_rank()], batches.flatten(1, 2)

        ranks.console.print(describe(model, whole), "", sep="\n")
        unsharded = Run("unsharded, 1 rank", whole[0].numel())
        sharded = Run(f"sharded, {ranks.world_size} ranks", mine[0].numel() // mpu.get_sequence_parallel_world_size())
        board = Board(ranks.console, options.steps, TOLERANCE)
        with board.live:
            sharded.saved_bytes = measure_saved_bytes(model, mine[0])
            if ranks.rank == 0:
                unsharded.saved_bytes = measure_saved_bytes(reference, whole[0])
                board.follow(unsharded, train(reference, whole, options.lr))
            unsharded = from_rank_0(unsharded)
            losses = train(DistributedDataParallel(model), mine, options.lr)
            board.follow(sharded, map(mean_over_ranks, losses), beside=unsharded)
        if not board.conclude(unsharded, sharded):
            sys.exit(1)


def train(model: nn.Module, batches: Tensor, lr: float) -> Iterator[float]:
    """Train on one batch a step, and yield each step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def make_byte_llama(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """A small Llama over bytes, and the bytes of the text."""
    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.sequence,
        use_cache=False,
    )
    return LlamaForCausalLM(config), torch.frombuffer(read_text(options), dtype=torch.uint8).long()


def load(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """A model by hub name or path, and the text in its tokens. In eval mode: dropout would tell the two runs apart."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.config.use_cache = False
    text = read_text(options).decode(errors="replace")
    tokens = AutoTokenizer.from_pretrained(options.model)(text, verbose=False)["input_ids"]
    return model.eval(), torch.tensor(tokens)


def read_text(options: argparse.Namespace) -> bytearray:
    """The text to train on."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    paths = sources if options.text is None else [options.text]
    return bytearray().join(path.read_bytes() for path in paths)


def make_batches(tokens: Tensor, options: argparse.Namespace, dp_size: int) -> Tensor:
    """Windows [steps, dp, B, S] of the text, the same on every rank. Unpadded: all hold equally many labels."""
    if len(tokens) < options.sequence:
        raise InputError(
            f"expected a text of {options.sequence} tokens or more, found {len(tokens)}. Use a smaller --sequence."
        )
    generator = torch.Generator().manual_seed(0)
    shape = options.steps, dp_size, options.batch, 1
    starts = torch.randint(len(tokens) - options.sequence + 1, shape, generator=generator)
    return tokens[starts + torch.arange(options.sequence)]


def mean_over_ranks(loss: float) -> float:
    """The loss of the global batch: ranks of one sequence hold the same loss, data-parallel replicas their own."""
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def describe(model: Any, batches: Tensor) -> str:
    """One line about the model, the ranks, and a step."""
    mpu = model.surgery.mpu
    return (
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters; "
        f"dp {mpu.get_data_parallel_world_size()} x sp {mpu.get_sequence_parallel_world_size()} ranks; "
        f"{batches.shape[1]} x {batches.shape[2]} tokens a step on {batches.device.type}"
    )


def measure_saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """The bytes this rank keeps between forward and backward, other than parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss  # alive until the count is taken, so that no address is used twice
    total = sum(storages.values())
    del loss
    return total


def from_rank_0(run: Run) -> Run:
    """Rank 0's value, on every rank."""
    values = [run]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train over sequence-parallel ranks beside the unsharded model.")
    parser.add_argument("--model", help="a hub name or local path; by default a small byte-level Llama")
    parser.add_argument("--text", type=Path, help="a file to train on; by default the standard library's sources")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences for each data-parallel replica (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (%(default)s)")
    parser.add_argument("--sp-size", type=int, help="ranks that share a sequence; by default all")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
