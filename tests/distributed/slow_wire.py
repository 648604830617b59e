"""A wire as slow as one between towns: joins two interfaces of this machine and delays what passes, both ways.

    python slow_wire.py INTERFACE INTERFACE BITS_PER_SECOND SECONDS

Not every kernel has netem, which would do the same. Prints a line when it is ready; runs until it is killed.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field

ALL_PROTOCOLS = 0x0003
SOL_PACKET, PACKET_VNET_HDR = 263, 15
# A frame may be one that the kernel has yet to cut into packets; its header in front says how, and passes with it.
LONGEST = 10 + 14 + 65536


@dataclass
class Direction:
    """What came in at one end and is due at the other."""

    source: socket.socket
    sink: socket.socket
    free: float = 0.0
    due: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, rate: float, delay: float) -> None:
        """Receive a frame: it waits for those before it, takes its time at the rate, and then travels."""
        frame, address = self.source.recvfrom(LONGEST)
        if address[2] == socket.PACKET_OUTGOING:
            return
        self.free = max(self.free, time.monotonic()) + 8 * len(frame) / rate
        self.due.append((self.free + delay, frame))

    def deliver(self) -> None:
        """Send what is due."""
        while self.due and self.due[0][0] <= time.monotonic():
            self.sink.send(self.due.popleft()[1])


def main(first: str, second: str, rate: float, delay: float) -> None:
    ends = []
    for name in (first, second):
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
        end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        end.bind((name, 0))
        ends.append(end)
    ways = {ends[0]: Direction(*ends), ends[1]: Direction(*reversed(ends))}
    print("ready", flush=True)
    while True:
        next_due = [way.due[0][0] for way in ways.values() if way.due]
        timeout = max(0.0, min(next_due) - time.monotonic()) if next_due else None
        for end in select.select(list(ways), [], [], timeout)[0]:
            ways[end].take(rate, delay)
        for way in ways.values():
            way.deliver()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
