"""Score distillation: what pulls a picture towards its words. Knows nothing of 3D."""

from distill3d.objectives.images import image_gradient
from distill3d.objectives.methods import (
    csd,
    esd,
    hifa,
    ism,
    mvdream,
    nfsd,
    rfds,
    sdi,
    sdi_cached,
    sds,
    sds_bridge,
    sjc,
    vsd,
)
from distill3d.objectives.noise import kappa_residual
from distill3d.objectives.objective import Objective, Query, attach

__all__ = [
    "Objective",
    "Query",
    "attach",
    "csd",
    "esd",
    "hifa",
    "image_gradient",
    "ism",
    "kappa_residual",
    "mvdream",
    "nfsd",
    "rfds",
    "sdi",
    "sdi_cached",
    "sds",
    "sds_bridge",
    "sjc",
    "vsd",
]
