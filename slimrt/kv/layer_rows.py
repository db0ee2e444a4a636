"""One layer's rows under a budget: resident slots, blocks in host memory, unit means."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from slimrt.config import CacheConfig, ModelConfig
from slimrt.kv.cache import Positions
from slimrt.kv.choice import Choice
from slimrt.kv.host_blocks import HostBlocks
from slimrt.kv.lending import LendableRows
from slimrt.kv.ring import Transfers, wait_all
from slimrt.ops.protocol import Array, Ops

__all__ = ["MOST_TOGETHER", "LayerRows"]

Fence = Any  # the backend's fence

MOST_TOGETHER = 16  # tokens of a pass of decode, at most: so many of the last rows can be taken back exactly


class _State(NamedTuple):
    """What decode would read next, before one row more came; the arrays are never changed."""

    spilled: bool
    choice: Choice | None
    slots: np.ndarray
    on_host: int
    wishes: np.ndarray
    wished_at: int


class LayerRows(LendableRows):
    """The rows of one layer.

    While they fit into the slots, row i lies at row i of ``resident`` and nothing else is used. After that
    (``spilled``) every complete block lies in host memory, ``slots`` says which block each resident slot holds, the
    block that is being filled (the tail) lies in the last slot in use, so that what decode reads is one range.
    """

    def __init__(self, ops: Ops, config: CacheConfig, model: ModelConfig, transfers: Transfers) -> None:
        self._ops, self._config, self._transfers = ops, config, transfers
        self._model = model
        self.capacity = config.slots * config.block
        self.positions = Positions()
        self.resident: Array | None = None  # [2, Hkv, capacity, Dh], made when the first row comes
        self._views: list[Array] = []  # [2, Hkv, block, Dh] of each slot
        self.host = HostBlocks(ops, config, model)
        self.row_bytes = self.host.block_bytes // config.block
        none = (model.n_kv_heads, 0, model.head_dim)
        self.means, self._group_means = ops.empty(none, ops.kv_type), ops.empty(none, ops.kv_type)
        self._slot_positions = np.empty(self.capacity, np.int64)
        self._wishes: np.ndarray  # what the last choice was made by
        self._wished_at: int  # how many rows there were then
        self._fetches: list[tuple[Fence, int]] = []  # with the bytes that are on their way
        self._spills: list[Fence] = []
        self._states: dict[int, _State] = {}  # by rows, of the last rows of decode
        self.reset()

    def __len__(self) -> int:
        return len(self.positions)

    def reset(self) -> None:
        """Forget all rows; no copy may be under way."""
        self.positions.truncate(0)
        self.spilled = False
        self.choice: Choice | None = None
        self.slots = np.empty(0, np.int64)  # block in each slot, once spilled; -1 for none
        self.on_host = 0  # complete blocks in host memory
        self.forget_wishes()
        self._states.clear()

    # -- copies under way ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Compute waits for all copies of this layer; the first exception is raised when all have ended."""
        try:
            wait_all(self._ops, self._transfers, [fence for fence, _ in self._fetches] + self._spills)
        except Exception:  # they have ended, one of them badly
            self._fetches, self._spills = [], []
            raise
        self._fetches, self._spills = [], []  # not where an interrupt came: they are still under way

    # -- all rows resident --------------------------------------------------------------------------------------------

    def append(self, k: Array, v: Array, positions: np.ndarray) -> tuple[Array, Array, np.ndarray]:
        """Append rows that fit while nothing is spilled; returns views of all."""
        held, length = len(self), len(self) + len(positions)
        resident = self._slots_memory()
        resident[0, :, held:length] = k.transpose(1, 0, 2)
        resident[1, :, held:length] = v.transpose(1, 0, 2)
        self.positions.append(positions)
        return resident[0, :, :length], resident[1, :, :length], self.positions.array

    def _slots_memory(self) -> Array:
        if self.resident is None:
            shape = (2, self._model.n_kv_heads, self.capacity, self._model.head_dim)
            resident = self._ops.empty(shape, self._ops.kv_type)
            self._views = [resident[:, :, _rows(slot, self._config.block)] for slot in range(self._config.slots)]
            self.resident = resident
        return self.resident

    # -- decode: some rows resident -----------------------------------------------------------------------------------

    def move_to(self, choice: Choice) -> None:
        """Start bringing the blocks of ``choice`` that are not resident into slots of blocks that it leaves out.

        The tail keeps its rows and gets the last slot. Compute has left this layer's slots since its last attention.
        """
        if not self.spilled:
            self.begin_spilling()
        self.settle()
        block, last = self._config.block, len(choice.complete)
        where = {number: slot for slot, number in enumerate(self.slots[last:].tolist(), last)}
        if choice.tail in self.slots:
            where[choice.tail] = self._slot_of(choice.tail)
        slots = np.full(last + 1, -1)
        slots[: len(self.slots)] = self.slots[: last + 1]
        slots[last] = choice.tail
        stays = (slots >= 0) & (slots < choice.tail)
        stays[stays] = choice.kept[slots[stays]]
        missing = choice.kept.copy()
        missing[slots[stays]] = False
        free = np.flatnonzero(~stays[:last])
        slots[free] = np.flatnonzero(missing)
        moves = list(zip(slots[free].tolist(), free.tolist(), strict=True))  # (block, slot) of what changes its place
        # An interrupt may come from here on: until all is in its place, the slots say where the tail is, if the host
        # lacks it, and nothing else.
        self.choice = None
        self.slots = np.where(self.slots == choice.tail, choice.tail, -1)
        if choice.tail in where and where[choice.tail] != last:
            self._place(choice.tail, last, self._views[where[choice.tail]])
            self.slots = np.where(np.arange(len(slots)) == last, choice.tail, -1)
        elif choice.tail not in where and len(self) > choice.tail * block:  # truncated within a block of the host
            moves.append((choice.tail, last))
        # A block in another slot (the one that was the tail) moves on the device at once; what comes from the host may
        # then overwrite where it lay.
        fetched = []
        for number, slot in moves:
            self._place(number, slot, self._views[where[number]] if number in where else None)
            if number not in where:
                fetched.append((slot, self.host.views[number]))
        if fetched:
            self._fetch(fetched)
        self.slots = slots
        self.choice = choice

    def _fetch(self, blocks: list[tuple[int, Array]]) -> None:
        """Start bringing host ``blocks``, (slot, block) each, once compute has left the slots."""
        nbytes = len(blocks) * self.host.block_bytes
        self._transfers.bytes_to_device += nbytes
        self._fetches.append((self._ops.fetch_blocks(self._slots_memory(), blocks, self._ops.mark()), nbytes))

    def _place(self, number: int, slot: int, view: Array | None) -> None:
        """Block ``number`` is to be in ``slot``; ``view``: where it lies on the device, None: on the host."""
        if view is not None:
            self._views[slot][...] = view
        positions = self.positions.array[_rows(number, self._config.block)]
        at = slot * self._config.block
        self._slot_positions[at : at + len(positions)] = positions

    def begin_spilling(self) -> None:
        """All slots are full, and one row more comes: from now on the host has the blocks as well."""
        self.slots = np.arange(self._config.slots)
        self._slot_positions[:] = self.positions.array
        self._spill(self._slots_memory(), 0, self._config.slots)
        self.spilled = True

    def _spill(self, device: Array, first: int, last: int) -> None:
        """Start copying complete blocks to the host, from ``device`` [2, Hkv, rows from ``first`` on, Dh]."""
        self.learn_means(device[0], first, last)
        self._spills.append(self._ops.copy(list(self.host.runs(device, first, last)), after=self._ops.mark()))
        self._transfers.bytes_to_host += (last - first) * self.host.block_bytes
        self.on_host = last

    def append_one(self, k: Array, v: Array, positions: np.ndarray) -> tuple[Array, Array, np.ndarray]:
        """Append a row [1, Hkv, Dh] to the tail; returns views of the resident rows, once they have arrived."""
        assert self.choice is not None
        if self._fetches:
            fetches, self._fetches = self._fetches, []
            for fence, nbytes in fetches:
                self._transfers.note_fetched(self._ops, fence, nbytes)
            wait_all(self._ops, self._transfers, [fence for fence, _ in fetches])
        block, resident = self._config.block, self._slots_memory()
        slot = len(self.slots) - 1  # the tail's
        row = slot * block + len(self) - self.choice.tail * block
        resident[0, :, row] = k[0]
        resident[1, :, row] = v[0]
        self._slot_positions[row] = positions[0]
        self.positions.append(positions)
        if len(self) == (self.choice.tail + 1) * block:
            self._spill(self._views[slot], self.choice.tail, self.choice.tail + 1)
        return resident[0, :, : row + 1], resident[1, :, : row + 1], self._slot_positions[: row + 1]

    def learn_means(self, keys: Array, first: int, last: int) -> None:
        """Unit means of complete blocks ``first`` to ``last``; keys [Hkv, rows from ``first`` on, Dh]."""
        c = self._config
        units = c.block // c.unit
        rows = keys[:, : (last - first) * c.block]
        self.means = self._room(self.means, first * units, last * units, c.group * units)
        self.means[:, first * units : last * units] = self._ops.unit_means(rows, c.unit)
        # Of the groups those that are complete now; the first may have begun with blocks that were known before.
        begun, complete = first // c.group, last // c.group
        if begun < complete:
            members = self.means[:, begun * c.group * units : complete * c.group * units]
            self._group_means = self._room(self._group_means, begun, complete, 1)
            self._group_means[:, begun:complete] = self._ops.unit_means(members, c.group * units)

    def _room(self, means: Array, held: int, wanted: int, multiple: int) -> Array:
        """``means`` [Hkv, n, Dh], n a ``multiple`` and at least ``wanted``, the first ``held`` as they were."""
        if wanted <= means.shape[1]:
            return means
        shape = means.shape[0], -(-2 * wanted // multiple) * multiple, means.shape[2]
        grown = self._ops.empty(shape, self._ops.kv_type)
        grown[:, :held] = means[:, :held]
        return grown

    def wanted(self, q: Array, tail: int) -> np.ndarray:
        """How much the query q [1, H, Dh] wants each of the first ``tail`` blocks -> [tail] float32 on the host.

        What the queries before it wanted counts too, less with each token (``decay``): what they read is read again
        soon, and what one could not tell by the units' means another could. Blocks that none was compared with have
        -inf. The array is kept: it may not be changed.
        """
        scores = self._compared(q, tail)
        if self._config.decay:
            earlier = self._wishes * np.float32(self._config.decay ** (len(self) - self._wished_at))
            np.maximum(scores[: len(earlier)], earlier, out=scores[: len(earlier)])
            self._wishes, self._wished_at = scores, len(self)
        return scores

    def forget_wishes(self) -> None:
        """The next query counts alone."""
        self._wishes, self._wished_at = np.empty(0, np.float32), 0

    def _compared(self, q: Array, tail: int) -> np.ndarray:
        """The score of each of the first ``tail`` blocks, [tail] on the host, or -inf.

        All are compared by their units while they are few; else the units of the best groups only (two levels, as in
        HiP, arXiv 2406.09827), and of the blocks behind the last complete group.
        """
        c, score = self._config, self._ops.score_blocks
        units, short = c.block // c.unit, c.shortlist * c.slots
        if tail <= max(short, c.group):
            return score(c.score, q, self.means[:, : tail * units], units, 1)
        groups, taken = tail // c.group, max(1, short // c.group)
        coarse = score(c.score, q, self._group_means[:, :groups], 1, 1)
        best = np.sort(np.argpartition(coarse, groups - taken)[groups - taken :])
        begun = tail % c.group  # blocks of the group that is not complete: the last of the shortlist
        if begun:
            best = np.append(best, groups)
        count = taken * c.group + begun
        blocks = (best[:, None] * c.group + np.arange(c.group)).reshape(-1)[:count]
        heads, _, width = self.means.shape
        fine = self._ops.columns(self.means.reshape(heads, -1, c.group * units * width), best)
        fine = fine.reshape(heads, -1, width)[:, : count * units]
        scores = np.full(tail, -math.inf, np.float32)
        scores[blocks] = score(c.score, q, fine, units, 1)
        return scores

    # -- prefill: all rows in a staging slot --------------------------------------------------------------------------

    def staged(self, slot: Array) -> list[tuple[Array, Array]]:
        """The copies (slot, host) that bring the spilled rows into ``slot`` [2, Hkv, rows, Dh], whole blocks at a time.

        The tail comes along if it is not resident; ``stage_resident`` brings the rest.
        """
        tail, begun = divmod(len(self), self._config.block)
        last = tail + (begun > 0 and tail not in self.slots) if self.spilled else 0
        return [(device, host) for host, device in self.host.runs(slot, 0, last)]

    def stage_resident(self, slot: Array) -> None:
        """Put the rows into ``slot`` that ``staged`` left out; after its copies, which may have written over them."""
        if not self.spilled:
            slot[:, :, : len(self)] = self._slots_memory()[:, :, : len(self)]
            return
        block = self._config.block
        tail, begun = divmod(len(self), block)
        if begun and tail in self.slots:
            slot[:, :, tail * block : len(self)] = self._views[self._slot_of(tail)][:, :, :begun]

    def settle_from(self, slot: Array, choice: Choice | None) -> None:
        """Fill the resident slots again from ``slot``, which holds all rows; ``choice`` None: they fit."""
        block, resident = self._config.block, self._slots_memory()
        self.choice, self.spilled = choice, choice is not None
        if choice is None:
            resident[:, :, : len(self)] = slot[:, :, : len(self)]
            self.slots, self.on_host = np.empty(0, np.int64), 0
            return
        self.slots = np.append(choice.complete, choice.tail)
        # One gather of whole blocks; what lies behind the last row is not read before it is written.
        heads, width = self._model.n_kv_heads, block * self._model.head_dim
        taken = len(self.slots)
        gathered = self._ops.columns(slot.reshape(2 * heads, -1, width), self.slots)
        resident[:, :, : taken * block] = gathered.reshape(2, heads, taken * block, -1)
        places = (self.slots[:, None] * block + np.arange(block)).reshape(-1)
        there = places < len(self)
        self._slot_positions[: taken * block][there] = self.positions.array[places[there]]

    def _slot_of(self, block: int) -> int:
        return int(np.flatnonzero(self.slots == block)[0])

    # -- forgetting ---------------------------------------------------------------------------------------------------

    def note_state(self, one: bool) -> None:
        """Rows come: ``one`` of decode, which ``truncate`` can take back as if it had never come, or others."""
        if not one:
            self._states.clear()
            return
        self._states[len(self)] = _State(
            self.spilled, self.choice, self.slots, self.on_host, self._wishes, self._wished_at
        )
        if len(self._states) > MOST_TOGETHER:
            del self._states[next(iter(self._states))]

    def _return_to(self, rows: int, state: _State) -> None:
        """Be as before row ``rows`` came: every block in the slot where it lay then, for sums run in that order."""
        if self.spilled:
            block, tail = self._config.block, len(self) // self._config.block
            blocks = -(-rows // block)
            slots = state.slots if state.spilled else np.arange(blocks)
            wanted = {int(number): slot for slot, number in enumerate(slots.tolist()) if 0 <= number < blocks}
            if tail in wanted and tail >= self.on_host and self.slots[wanted[tail]] != tail:
                # The host lacks it. Until all is in its place, the slots say where it is, and nothing else.
                now = self._slot_of(tail)
                self.choice, self.slots = None, np.where(self.slots == tail, tail, -1)
                self._place(tail, wanted[tail], self._views[now])
                self.slots = np.where(np.arange(len(self.slots)) == wanted[tail], tail, -1)
            held = {number: slot for slot, number in enumerate(self.slots.tolist())}
            missing = [(slot, number) for number, slot in wanted.items() if held.get(number) != slot]
            self.choice, self.slots = None, np.where(self.slots == tail, tail, -1)
            for slot, number in missing:
                self._place(number, slot, None)
            if missing:
                fetched = [(slot, self.host.views[number]) for slot, number in missing]
                self._fetch(fetched)
                self.settle()
        self.spilled, self.choice, self.slots, self.on_host, self._wishes, self._wished_at = state
        self._states = {held: one for held, one in self._states.items() if held < rows}
        self.positions.truncate(rows)

    def truncate(self, length: int) -> None:
        """Forget the rows from position ``length`` on; no copy may be under way."""
        rows = self.positions.before(length)
        if rows == len(self):
            return
        if not rows:
            self.reset()
            return
        if rows in self._states:
            self._return_to(rows, self._states[rows])
            return
        self._states.clear()
        if self.spilled:
            tail, begun = divmod(rows, self._config.block)
            self.forget_wishes()
            self.on_host = min(self.on_host, tail)
            # What stays resident is the block that rows will be appended to; the next choice brings the others back.
            self.choice = None
            self.slots = np.where((self.slots == tail) & (begun > 0), tail, -1)
        self.positions.truncate(rows)

    # -- looking ------------------------------------------------------------------------------------------------------

    def rows(self) -> tuple[Array, Array, np.ndarray]:
        """All rows, gathered in host memory; no copy may be under way."""
        n, block = len(self), self._config.block
        shape = (2, self._model.n_kv_heads, -(-n // block) * block, self._model.head_dim)
        whole = self._ops.pinned(shape, self._ops.kv_type)
        for device, host in self.staged(whole):
            device[...] = host
        tail, begun = divmod(n, block)
        if not self.spilled:
            whole[:, :, :n] = self._ops.to_host(self._slots_memory()[:, :, :n])
        elif begun and tail in self.slots:
            whole[:, :, tail * block : n] = self._ops.to_host(self._views[self._slot_of(tail)][:, :, :begun])
        return whole[0, :, :n], whole[1, :, :n], self.positions.array

    @property
    def nbytes_device(self) -> int:
        if not self.spilled:
            return len(self) * self.row_bytes
        block = self._config.block
        held = sum(min(block, len(self) - number * block) for number in self.slots.tolist() if number >= 0)
        means = self.on_host * (block // self._config.unit) + self.on_host // self._config.group
        mean_bytes = self.means.shape[0] * self.means.shape[2] * self.means.dtype.itemsize
        return held * self.row_bytes + means * mean_bytes

    @property
    def nbytes_host(self) -> int:
        return self.on_host * self.host.block_bytes

    def close(self) -> None:
        self.resident = None
        self._views.clear()
        self.host.clear()


def _rows(number: int, block: int) -> slice:
    return slice(number * block, (number + 1) * block)
