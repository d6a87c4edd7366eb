"""Runs under the Python of DeepSparse's own environment; ``deepsparse.py`` starts it.

``deepsparse_server.py X.npy MODEL.onnx THREADS OUTPUT.npy``: compiles the model,
writes its output on X, prints ``ready``, then for every line of standard input, a
number of calls, prints the seconds of each call on one line.
"""

import sys
import time

import numpy as np
from deepsparse import Engine


def main() -> None:
    x_file, model, threads, output = sys.argv[1:]
    x = [np.load(x_file)]
    engine = Engine(model=model, batch_size=len(x[0]), num_cores=int(threads))
    np.save(output, engine.run(x, val_inp=False)[0])
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            started = time.perf_counter()
            engine.run(x, val_inp=False)
            times.append(time.perf_counter() - started)
        print(*times, flush=True)


if __name__ == "__main__":
    main()
