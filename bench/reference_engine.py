"""The reference's side of engine_bench: transformers' Switch Transformer, eager.

usage: reference_engine.py FOLDER THREADS DTYPE DEVICE
Reads FOLDER (checkpoint and inputs.safetensors), prints "ready", then answers each line:
`forward`, `stacks` (both stacks without the vocabulary's product) and `decode N` run once and
print the seconds; `logits` writes outputs.safetensors, of fp32 on the CPU (less than 3 GiB) also
those in double precision.
"""
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import SwitchTransformersForConditionalGeneration


@torch.no_grad()
def main(folder, threads, dtype, device):
    torch.set_num_threads(threads)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager").eval().to(device)
    inputs = {name: x.to(device) for name, x in load_file(folder / "inputs.safetensors").items()}
    ids, valid, decoder_ids = inputs["ids"], inputs["valid"].long(), inputs["decoder_ids"]

    encoded = model.get_encoder()(input_ids=ids[:1], attention_mask=valid[:1])

    def forward():
        return model(input_ids=ids, attention_mask=valid, decoder_input_ids=decoder_ids)

    def stacks():
        hidden = model.get_encoder()(input_ids=ids, attention_mask=valid).last_hidden_state
        return model.get_decoder()(input_ids=decoder_ids, encoder_hidden_states=hidden, encoder_attention_mask=valid)

    def decode(steps):
        return model.generate(encoder_outputs=encoded, attention_mask=valid[:1], do_sample=False, num_beams=1,
                              min_new_tokens=steps, max_new_tokens=steps, use_cache=True)

    def wait():
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    print("ready", flush=True)
    for line in sys.stdin:
        words = line.split()
        wait()
        start = time.perf_counter()
        if words[0] == "forward":
            forward()
        elif words[0] == "stacks":
            stacks()
        elif words[0] == "decode":
            decode(int(words[1]))
        elif words[0] == "logits":
            out = {"logits": forward().logits.float().cpu().contiguous()}
            bytes_held = sum(p.nbytes for p in model.parameters())
            if dtype == torch.float32 and device == "cpu" and bytes_held < 3 << 30:  # three times that, for a while
                model.double()
                out["double"] = forward().logits.contiguous()
                model.float()  # every number is what it was
            save_file(out, folder / "outputs.safetensors")
        wait()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]),
         {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[sys.argv[3]], sys.argv[4])
