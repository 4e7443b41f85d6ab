"""llama.cpp's own HTTP server, from the ``xllamacpp`` wheel, as the peer of ``vs_llama_cpp.py``.

Run as a program it serves one GGUF file until its standard input ends.  As a module it makes the other two files that
the peer is measured with: the same weights in Q4_0 and Q8_0, for which llama.cpp has faster kernels than for the Q4_1
of the file as shipped.  Knows nothing about Helix.
"""

import argparse
import sys
from pathlib import Path

NGRAM = "ngram"
"""llama.cpp's drafts from the prompt and what was said so far (its ``ngram-simple``)."""


def requantised(source, kind, folder):
    """The path of a copy of a GGUF file whose matrices are all of one type, ``"Q4_0"`` or ``"Q8_0"``; made once."""
    import gguf

    path = folder / f"{Path(source).stem.rsplit('.', 1)[0]}.{kind}.gguf"
    if path.exists():
        return path
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, architecture)
    copy_fields(reader, writer)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 2:
            packed = gguf.quants.quantize(values, wanted)
            writer.add_tensor(tensor.name, packed, raw_shape=packed.shape, raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def copy_fields(reader, writer):
    """All that a file says of itself, but what the writer says on its own."""
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        element = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, element)


def serve(options):
    """Serve until standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(options.file)
    params.n_parallel = options.parallel
    params.n_ctx = options.parallel * options.context
    params.port = options.port
    params.verbosity = 0
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = options.threads
    if options.speculation == NGRAM:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    server = xllamacpp.Server(params)
    print(f"listens at {server.listening_address}", flush=True)
    sys.stdin.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=16, help="requests at once")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each request")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speculation", choices=["off", NGRAM], default="off")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
