"""What one step of training starts on a device, counted in the text of the program that XLA has optimised."""

import functools
import operator
import re
from collections import Counter
from typing import NamedTuple

# They move no data, or run other computations, which are counted.
FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
    *("opt-barrier", "domain", "partition-id", "replica-id", "while", "conditional", "call", "async-start"),
}
# Custom calls that are notes for the compiler, and no kernel.
NOTES = {"Sharding", "AllocateBuffer", "AssumeGatherIndicesInBound", "annotate_device_placement"}
COLLECTIVE = re.compile(r"(all-|reduce-scatter|collective-|ragged-all-to-all)")
HOST_TRANSFER = re.compile(r"(infeed|outfeed|send|recv)$")
# The computations that run, instruction by instruction, where an instruction does.
RUNS = {
    "while": ("body",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
    "async-start": ("calls",),
}


class Step(NamedTuple):
    """One step of training on one device.

    Attributes:
      launches: Instructions that do something: on a GPU, the kernels and copies that are started for them.
      convolutions: XLA's own and cuDNN's, also those within a fusion.
      grouped_convolutions: Those of them with several groups of channels or of images.
      matmuls: XLA's own, cuBLAS's and Triton's, also those within a fusion.
      collectives: Exchanges among devices.
      host_transfers: What goes to the host or comes from it, conditions that it has to read among them.
      known_trip_count: Whether the number of steps is known before the first one.
    """

    launches: int
    convolutions: int
    grouped_convolutions: int
    matmuls: int
    collectives: int
    host_transfers: int
    known_trip_count: bool


class Instruction(NamedTuple):
    """An instruction, such as `%a = f32[2]{0} fusion(%b), kind=kLoop, calls=%c`.

    Attributes:
      shape: `f32[2]{0}`, of its result.
      opcode: `fusion`.
      rest: What follows the opcode.
    """

    shape: str
    opcode: str
    rest: str

    def computations(self, attribute: str) -> list[str]:
        """Return the computations that an attribute names."""
        named = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest)
        return re.findall(r"[^{}%, ]+", named[1]) if named else []

    @property
    def runs(self) -> list[str]:
        """The computations that run, instruction by instruction, where this one does."""
        return [name for attribute in RUNS.get(self.opcode, ()) for name in self.computations(attribute)]


Computations = dict[str, list[Instruction]]


def count_step(text: str, *, host_decides: bool) -> Step:
    """Count what the loop over the steps does in each: of all loops, the one with the most products in its own body.

    A loop within it counts as often as it turns, or once where that is not known; of the branches of a condition, the
    larger number counts. Of a single step XLA leaves no loop: then the whole program counts.

    Args:
      text: The optimised program.
      host_decides: Whether the host reads conditions back from the device, as it does from a GPU.
    """
    computations = read_computations(text)
    (entry,) = re.findall(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    products = {loop: _own_products(computations, loop) for loop in _loops(computations, entry)}
    loop = max(products, key=products.__getitem__, default=None)
    turns, body = 1, entry
    if loop is not None and products[loop]:
        turns, body = _trip_count(computations, loop), loop.runs[0]
    counts = _count(computations, body, host_decides)
    counts["host_transfers"] += host_decides and turns is None
    return Step(**{name: counts[name] for name in Step._fields[:-1]}, known_trip_count=turns is not None)


def read_computations(text: str) -> Computations:
    """Return the instructions of each computation of a program."""
    computations: Computations = {}
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            instructions = computations[header[1]] = []
        elif line.startswith("  ") and " = " in line:
            value = line.partition(" = ")[2]
            shape = value[: _length_of_shape(value)]
            opcode, _, rest = value[len(shape) + 1 :].partition("(")
            instructions.append(Instruction(shape, opcode, rest))
    return computations


def _length_of_shape(text: str) -> int:
    """Return the length of the shape that a text begins with: up to the first space outside all brackets."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:
            return place
    return len(text)


def _loops(computations: Computations, name: str) -> list[Instruction]:
    """Return the loops in a computation and in all that it runs."""
    loops = []
    for instruction in computations[name]:
        loops += [instruction] if instruction.opcode == "while" else []
        loops += [loop for run in instruction.runs for loop in _loops(computations, run)]
    return loops


def _own_products(computations: Computations, loop: Instruction) -> int:
    own = [instruction for instruction in computations[loop.runs[0]] if not instruction.runs]
    counts = _count(computations | {"": own}, "", host_decides=False)
    return counts["convolutions"] + counts["matmuls"]


def _does_something(instruction: Instruction) -> bool:
    # What "-done" and "-update" end was counted where it started.
    name = instruction.opcode
    return not (name in FREE or name.endswith(("-done", "-update")) or _custom_call(instruction) in NOTES)


def _custom_call(instruction: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    return target[1] if target else ""


def _trip_count(computations: Computations, loop: Instruction) -> int | None:
    """Return how often a loop turns, or None where that depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    # A TPU's compiler does not write it down: there it is known where a counter from 0 is compared with a constant.
    (condition,) = loop.computations("condition")
    instructions = computations[condition]
    bounds = [instruction for instruction in instructions if instruction.opcode == "constant"]
    read = [instruction for instruction in instructions if instruction.opcode == "get-tuple-element"]
    return int(bounds[0].rest.partition(")")[0]) if len(bounds) == len(read) == 1 else None


def _count(computations: Computations, name: str, host_decides: bool) -> Counter[str]:
    """Count what a computation does."""
    counts: Counter[str] = Counter()
    for instruction in computations[name]:
        opcode, times, reads = instruction.opcode, 1, False
        parts = [_count(computations, run, host_decides) for run in instruction.runs]
        if opcode == "while":
            turns = _trip_count(computations, instruction)
            times, reads = turns or 1, turns is None
        elif opcode == "conditional":
            parts, reads = [functools.reduce(operator.or_, parts)], True  # the larger of each number
        elif opcode == "fusion":
            (fused,) = instruction.computations("calls")
            part = _count(computations, fused, host_decides)
            parts = [Counter({kind: part[kind] for kind in ("convolutions", "grouped_convolutions", "matmuls")})]
        for part in parts:
            counts.update({kind: times * number for kind, number in part.items()})
        counts.update(_kinds(instruction))
        counts["host_transfers"] += reads and host_decides
    return counts


def _kinds(instruction: Instruction) -> list[str]:
    """Return what an instruction counts as."""
    if not _does_something(instruction):
        return []
    opcode, rest, target = instruction.opcode, instruction.rest, _custom_call(instruction)
    kinds = ["launches"]
    # A TPU's compiler makes a convolution of each matrix product.
    is_product = opcode == "convolution" and re.search(r'op_name="[^"]*dot_general"', rest)
    if opcode in ("dot", "scaled-dot") or is_product or target.startswith("__cublas"):
        kinds.append("matmuls")
    elif opcode == "convolution" or target.startswith("__cudnn$conv"):
        kinds.append("convolutions")
        if any(int(groups) > 1 for groups in re.findall(r"\b(?:feature|batch)_group_count=(\d+)", rest)):
            kinds.append("grouped_convolutions")
    elif COLLECTIVE.match(opcode):
        kinds.append("collectives")
    if (
        HOST_TRANSFER.match(opcode)
        or "callback" in target
        or "is_host_transfer=true" in rest
        or "S(5)" in instruction.shape
    ):
        kinds.append("host_transfers")
    return kinds
