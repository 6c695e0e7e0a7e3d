"""Folders with small tokenizers of the forms that other models have, trained here."""

import functools
import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the place serves cheap food near a river and it is rated high by families who like tea 12 345 6789 ",
          "don't they're I'll it's   spaces\n\nlines  and\ttabs\n",
          "Café naïve über straße 日本語 русский слово e\u0301"] * 20
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")


@functools.cache
def sentencepiece(metaspace: str = "") -> str:
    """Llama 2's form: byte fallback, a space in front by the normalizer, or by Metaspace with that prepend_scheme."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training alone
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in special]
    content["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(content))
    if metaspace:
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=metaspace, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1",
                                                        special_tokens=[("<s>", 1)])
    return made.to_str()


@functools.cache
def byte_level(pattern: str, normalizer: str = "", begin: str = "") -> str:
    """Llama 3's and Qwen's form: words by a pattern, special tokens behind the vocabulary, which has 400 ids."""
    made = Tokenizer(models.BPE(ignore_merges=bool(begin)))
    first = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else pre_tokenizers.Digits(True)
    made.pre_tokenizer = pre_tokenizers.Sequence([
        first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)])
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizers.NFC() if normalizer else None
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=397, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    assert len(vocab) <= 397
    made.add_special_tokens([AddedToken(token, special=True, normalized=False)
                             for token in ("<|begin|>", "<|endoftext|>", "<|im_end|>")])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if begin:
        template = processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1",
                                                 special_tokens=[(begin, made.token_to_id(begin))])
        made.post_processor = processors.Sequence([made.post_processor, template])
    return made.to_str()


PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# name -> (tokenizer.json, tokenizer_config.json, model_type)
FORMS = {
    "Llama 2": (sentencepiece, (), {"tokenizer_class": "PreTrainedTokenizerFast", **PIECES}, "llama"),
    "Llama 2, by its class": (sentencepiece, ("first",), {"tokenizer_class": "LlamaTokenizer", **PIECES}, "llama"),
    "Mistral": (sentencepiece, ("always",), {"tokenizer_class": "LlamaTokenizer", **PIECES, "pad_token": "<unk>",
                                             "add_bos_token": True}, "mistral"),
    "Llama 3": (byte_level, (LLAMA3, "", "<|begin|>"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": True}, "llama"),
    "Qwen2": (byte_level, (QWEN2, "NFC"), {
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>"}, "qwen2"),
    "SmolLM2": (byte_level, ("",), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_end|>",
        "eos_token": {
            "__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True}}, "llama"),
}


def write_tokenizer(folder: pathlib.Path, form: str, **config: object) -> pathlib.Path:
    """The folder with a tokenizer of FORMS, its tokenizer_config.json, and a config.json that holds `config`, too."""
    make, arguments, tokenizer_config, model_type = FORMS[form]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(make(*arguments), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return folder


def edit(path: pathlib.Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
