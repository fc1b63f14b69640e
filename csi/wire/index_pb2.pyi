from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HashAlgorithm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HASH_ALGORITHM_UNSPECIFIED: _ClassVar[HashAlgorithm]
    HASH_ALGORITHM_BLAKE3: _ClassVar[HashAlgorithm]
HASH_ALGORITHM_UNSPECIFIED: HashAlgorithm
HASH_ALGORITHM_BLAKE3: HashAlgorithm

class BlockIndex(_message.Message):
    __slots__ = ("version", "blobs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    version: int
    blobs: _containers.RepeatedCompositeFieldContainer[BlobBlocks]
    def __init__(self, version: _Optional[int] = ..., blobs: _Optional[_Iterable[_Union[BlobBlocks, _Mapping]]] = ...) -> None: ...

class BlobBlocks(_message.Message):
    __slots__ = ("digest", "size_bytes", "block_bytes", "algorithm", "hashes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    block_bytes: int
    algorithm: HashAlgorithm
    hashes: bytes
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., block_bytes: _Optional[int] = ..., algorithm: _Optional[_Union[HashAlgorithm, str]] = ..., hashes: _Optional[bytes] = ...) -> None: ...
