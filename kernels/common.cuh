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
