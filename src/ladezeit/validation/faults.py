"""The faults that the levels of validation are measured by: what can be wrong with a loaded model, and where it arose.

Each level declares next to its code, as ``CLAIMS``, which of these it finds whatever engine loaded. The fault bench
plants every one of them and holds each level to its claims.
"""

from enum import StrEnum


class Fault(StrEnum):
    """Something wrong with a checkpoint's files, or with the model that an engine made of them."""

    flipped_bit_in_file = "flipped_bit_in_file"
    swapped_words_in_file = "swapped_words_in_file"
    swapped_tensors_in_file = "swapped_tensors_in_file"
    nan_in_file = "nan_in_file"
    missing_in_file = "missing_in_file"
    extra_in_file = "extra_in_file"
    wrong_shape_in_file = "wrong_shape_in_file"
    wrong_dtype_in_file = "wrong_dtype_in_file"
    truncated_file = "truncated_file"
    trailing_bytes = "trailing_bytes"
    overlapping_offsets = "overlapping_offsets"
    header_length_lie = "header_length_lie"
    flipped_bit = "flipped_bit"
    swapped_words = "swapped_words"
    swapped_tensors = "swapped_tensors"
    planted_nan = "planted_nan"
    missing_tensor = "missing_tensor"
    extra_tensor = "extra_tensor"
    wrong_shape = "wrong_shape"
    wrong_dtype = "wrong_dtype"
    buffer_on_meta = "buffer_on_meta"
    weight_on_meta = "weight_on_meta"
    untied_head = "untied_head"
    silent_offload = "silent_offload"
    overwritten_buffer = "overwritten_buffer"
    freed_buffer = "freed_buffer"


#: What each is, in a reader's words.
WORDS = {
    Fault.flipped_bit_in_file: "one bit of a weight flipped in the file",
    Fault.swapped_words_in_file: "two numbers of a weight exchanged in the file",
    Fault.swapped_tensors_in_file: "two weights of one shape exchanged in the file",
    Fault.nan_in_file: "a NaN in a weight in the file",
    Fault.missing_in_file: "a weight missing in the file",
    Fault.extra_in_file: "a weight too many in the file",
    Fault.wrong_shape_in_file: "a weight of another shape in the file, same bytes",
    Fault.wrong_dtype_in_file: "a weight of another dtype in the file, same bytes",
    Fault.truncated_file: "the file ends too early",
    Fault.trailing_bytes: "bytes behind the file's last weight",
    Fault.overlapping_offsets: "two weights overlap in the file",
    Fault.header_length_lie: "the header claims to be longer than the file",
    Fault.flipped_bit: "one bit of a weight flipped in memory",
    Fault.swapped_words: "two numbers of a weight exchanged in memory",
    Fault.swapped_tensors: "two weights of one shape exchanged in memory",
    Fault.planted_nan: "a NaN in a weight in memory",
    Fault.missing_tensor: "a weight that the model does not have",
    Fault.extra_tensor: "a buffer that the model should not have",
    Fault.wrong_shape: "a weight of another shape in memory, same bytes",
    Fault.wrong_dtype: "a weight of another dtype in memory, same values",
    Fault.buffer_on_meta: "a buffer left without data",
    Fault.weight_on_meta: "a weight left without data, in the middle of the model",
    Fault.untied_head: "an output head that is a copy of the embedding it should be",
    Fault.silent_offload: "a layer moved to the disk and not asked for",
    Fault.overwritten_buffer: "a weight in a buffer that the engine overwrites when it closes",
    Fault.freed_buffer: "a weight in memory that the engine gave back, its bytes still right",
}

#: What the checks of headers and lengths refuse before anything is loaded, whatever the level.
BEFORE_LOADING = frozenset(
    {Fault.truncated_file, Fault.trailing_bytes, Fault.overlapping_offsets, Fault.header_length_lie}
)
