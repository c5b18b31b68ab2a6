"""One lock for what libraries do to the whole process, so that steps may run in threads beside each other."""

from __future__ import annotations

import threading

PROCESS_STATE = threading.RLock()
"""Held by a training from its seed to its last step, and by whoever builds a model.

The Trainer draws from torch's global generator, and so do many models while they are built; transformers loads models
by switching torch's initialisers off for the whole process. Either, in another thread, would change a training's
examples, dropout or new weights. Data loaders outside of trainings get a generator of their own (`batches`).
"""
