// The 16-bit type this compilation is for, and the shape of a kernel's name. Included anew by every kernel file: the
// emulation compiles each file once per type in one program.
#undef TP_KERNEL
#undef TP_HALF
#ifdef TP_F16
#define TP_HALF F16
#define TP_KERNEL(name) TP_CONCAT(name, f16)
#else
#define TP_HALF Bf16
#define TP_KERNEL(name) TP_CONCAT(name, bf16)
#endif

// Attention is compiled once per head size as well, each a module of its own (-DTP_HEAD_SIZE=128): a run loads, and a driver
// without the card's own code compiles, only the one it needs. 0: all of them.
#ifndef TP_HEAD_SIZE
#define TP_HEAD_SIZE 0
#endif
