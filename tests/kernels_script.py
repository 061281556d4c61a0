"""Compiles every Triton kernel for a GPU that need not be there: python kernels_script.py COMPUTE_CAPABILITY

Prints one JSON object: by kernel, bytes of shared memory, and of a thread's numbers that found no register.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from nexus_gpt_oss.backends import fused
from nexus_gpt_oss.decoding import triton_bits
from nexus_gpt_oss.decoding.format import GROUP_BYTES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What arguments are; all others of a kernel are constants. Whole numbers and addresses are multiples of 16.
TYPES = {
    "packed": "*u8",
    "blocks": "*u8",
    "scales": "*u8",
    "rows": "*bf16",
    "bias": "*bf16",
    "product": "*bf16",
    "tiles": "*i32",
    "outputs": "i32",
    "inputs": "i32",
}


def compiled(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    names = [parameter.name for parameter in kernel.params]
    places = [place for place, name in enumerate(names) if name not in constants]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in places},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measured(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    found = re.search(r"STACK:(\d+)", said)
    assert found, said
    return {"shared_bytes": kernel.metadata.shared, "spilled_bytes": int(found[1])}


def main(capability: int) -> None:
    found = {}
    for dtype, pair in ((torch.bfloat16, "i32"), (torch.float32, "i64")):
        constants = {
            "BYTES": triton_bits.BYTES_PER_PROGRAM,
            "GROUP_BYTES": GROUP_BYTES,
            "IS_WIDE": dtype != torch.bfloat16,
        }
        # A layer of 128 experts has 2**30 bytes, more of them would be counted in 64 bits.
        for count in ("i32", "i64"):
            types = TYPES | {"pairs": f"*{pair}", "count": count}
            kernel = compiled(triton_bits._decode_kernel, capability, types, constants)
            found[f"decode to {dtype}, {count}"] = measured(kernel)
    for tile in fused.TILES:
        for name, function in (("outputs", fused._outputs_kernel), ("inputs", fused._inputs_kernel)):
            kernel = compiled(function, capability, TYPES, tile.constants, num_warps=tile.warps)
            found[f"{name}, {tile.rows}x{tile.columns}"] = measured(kernel)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
