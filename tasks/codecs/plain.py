"""The codecs that write a tensor by themselves. `auto` chooses among them; `AnyCodec` has them all."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME
from tasks.codecs.bitdelta import BitDelta
from tasks.codecs.dense import Dense
from tasks.codecs.exact import Exact
from tasks.codecs.low_rank import LowRank
from tasks.codecs.rtn import Rtn
from tasks.codecs.seeded_dare import SeededDare
from tasks.codecs.skillpack import SkillPack
from tasks.codecs.ternary import Ternary

Plain = Dense | Exact | Ternary | Rtn | BitDelta | LowRank | SeededDare | SkillPack  # a new codec goes here
AnyPlain = Annotated[Plain, BY_NAME]
