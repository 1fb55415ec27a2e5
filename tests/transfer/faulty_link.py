"""A relay between senders and one worker that drops, repeats, swaps, cuts short, flips, delays and cuts off."""

import itertools
import random
import threading
import time

import zmq

from transfer.messages import SenderWelcome, decode_from_receiver, encode

WHOLE = ("drop", "duplicate", "swap", "delay")
ACTIONS = (*WHOLE, "flip", "truncate")


class FaultyLink:
    """Forwards both sockets of the KV plane. ``faults`` is the share of messages that ``actions`` happen to; control
    messages, which CURVE or TCP keeps whole, only get lost, late, out of order and repeated.

    While :attr:`cut` is set everything is lost, as if the cable were out.
    """

    def __init__(self, worker, *, faults=0.0, actions=ACTIONS, seed=0, delay_s=0.02):
        self.worker = worker
        self.faults, self.actions, self.delay_s = faults, actions, delay_s
        self.random = random.Random(seed)
        self.cut = threading.Event()
        self.done = dict.fromkeys((*actions, "cut"), 0)
        self.context = zmq.Context()
        self.control = self._bound(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{_port(self.control)}"
        self.frames = self._bound(zmq.PULL)
        self.onward = self.context.socket(zmq.PUSH)
        self.onward.linger = 0
        self.onward.connect(f"tcp://127.0.0.1:{worker.receiver.frames_port}")
        self.backs = {}
        self.held = []
        self.late = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def _bound(self, kind):
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.bind_to_random_port("tcp://127.0.0.1")
        return socket

    def run(self):
        poller = zmq.Poller()
        for socket in (self.control, self.frames):
            poller.register(socket, zmq.POLLIN)
        while not self.stopping.is_set():
            ready = dict(poller.poll(5))
            if not ready:
                self._release()
            if self.control in ready:
                identity, *parts = self.control.recv_multipart()
                if identity not in self.backs:
                    back = self.backs[identity] = self.context.socket(zmq.DEALER)
                    back.linger = 0
                    back.routing_id = identity
                    back.connect(self.worker.endpoint)
                    poller.register(back, zmq.POLLIN)
                self._forward(parts, self.backs[identity].send_multipart, WHOLE)
            if self.frames in ready:
                self._forward(self.frames.recv_multipart(), self.onward.send_multipart)
            for identity, back in self.backs.items():
                if back in ready:
                    parts = self._redirected(back.recv_multipart())
                    self._forward(
                        parts, lambda p, identity=identity: self.control.send_multipart([identity, *p]), WHOLE
                    )
            for due, deliver, parts in [late for late in self.late if late[0] < time.monotonic()]:
                self.late.remove((due, deliver, parts))
                deliver(parts)
        for socket in (self.control, self.frames, self.onward, *self.backs.values()):
            socket.close()

    def _redirected(self, parts):
        """A welcome names the port that frames go to: ours."""
        message = decode_from_receiver(parts[0])
        if isinstance(message, SenderWelcome):
            fields = {name: getattr(message, name) for name in message.__struct_fields__}
            return [encode(SenderWelcome(**{**fields, "frames_port": _port(self.frames)}))]
        return parts

    def _forward(self, parts, deliver, possible=ACTIONS):
        if self.cut.is_set():
            self.done["cut"] += 1
            return
        action = self.random.choice(self.actions) if self.random.random() < self.faults else "pass"
        if action not in possible:
            action = "pass"
        if action != "pass":
            self.done[action] += 1
        match action:
            case "pass":
                deliver(parts)
            case "duplicate":
                deliver(parts)
                deliver(parts)
            case "flip":
                deliver(flipped(parts, self.random.randrange(1 << 30)))
            case "truncate":
                at = self.random.randrange(len(parts))
                deliver([*parts[:at], parts[at][: self.random.randrange(1 + len(parts[at]))], *parts[at + 1 :]])
            case "delay":
                self.late.append((time.monotonic() + self.delay_s, deliver, parts))
            case "swap":
                self.held.append((deliver, parts))
                return
        self._release()

    def _release(self):
        for deliver, parts in self.held:
            deliver(parts)
        self.held.clear()

    def close(self):
        self.stopping.set()
        self.thread.join()
        self.context.term()


def flipped(parts, bit):
    """The parts with one bit turned, counted over all of them."""
    whole = bytearray(b"".join(parts))
    bit %= 8 * len(whole)
    whole[bit // 8] ^= 1 << bit % 8
    edges = [0, *itertools.accumulate(map(len, parts))]
    return [bytes(whole[a:b]) for a, b in itertools.pairwise(edges)]


def _port(socket):
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
