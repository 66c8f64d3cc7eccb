"""An engine of one's own for the benchmark, in some twenty lines.

    cd benchmarks && vembed-ckpt bench --engine own_engine:CopyThenSave

It copies the state in the call and lets a thread write it, as many training loops do.
"""

import copy
import os
import threading

import torch

from vembed_async_ckpt.bench import Engine, Handle


class CopyThenSave(Engine):
    lacks = (
        "no fsync, no hash, files in place"  # shown with the results; `syncs = True` if nothing is left to be synced
    )

    def save(self, number):
        state = copy.deepcopy(self.state.state_dict())  # the model's and the optimizer's
        os.makedirs(self.path(number))
        writing = threading.Thread(target=torch.save, args=(state, self.path(number) + "/state.pt"))
        writing.start()
        return Handle(
            wait=writing.join
        )  # `barrier=` is called before the optimizer's step, if something is copied until then

    def load(self, number):
        found = torch.load(self.path(number) + "/state.pt")
        self.state.model.load_state_dict(found["model"])
        self.state.optimizer.load_state_dict(found["optimizer"])
