"""FP4 training for JAX: quantised linear layers, their numerics, and the models that use them."""

from jfp4 import master as master
from jfp4 import nn as nn
from jfp4 import optim as optim
from jfp4.adamw import AdamW as AdamW
from jfp4.formats import FORMATS as FORMATS
from jfp4.formats import Format as Format
from jfp4.formats import pack as pack
from jfp4.formats import round_to_format as round_to_format
from jfp4.formats import unpack as unpack
from jfp4.nn import convert as convert
from jfp4.ops.calibration import Calibration as Calibration
from jfp4.ops.calibration import calibrate as calibrate
from jfp4.ops.exchange import grad_comm as grad_comm
from jfp4.ops.ffi import Backends as Backends
from jfp4.ops.ffi import backend as backend
from jfp4.ops.ffi import backends as backends
from jfp4.ops.gemm import gemm as gemm
from jfp4.ops.linear import linear as linear
from jfp4.ops.linear import save_codes as save_codes
from jfp4.ops.prepare import PreparedWeight as PreparedWeight
from jfp4.ops.prepare import prepare as prepare
from jfp4.ops.quantize import quantize as quantize
from jfp4.qtensor import PackedQTensor as PackedQTensor
from jfp4.qtensor import QTensor as QTensor
from jfp4.recipe import RECIPES as RECIPES
from jfp4.recipe import Recipe as Recipe
