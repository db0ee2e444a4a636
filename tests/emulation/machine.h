// What a kernel sees of the machine that runs it, and how it is launched. See emulation.h; the machine itself is in state.h.
//
// Nothing is included: the C++ library's headers would take g++ longer than most kernels do.
#pragma once

using size_t = decltype(sizeof 0);
using uintptr_t = __UINTPTR_TYPE__;
using uint64_t = __UINT64_TYPE__;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

extern "C" {
extern char __start_kernel_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_kernel_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulation {

constexpr int WARP = 32;

struct Thread {
    dim3 index;
    int lane, lanes;  // its place in its warp, and how many the warp has
};

struct Running {
    Thread* current = nullptr;
    dim3 block_index, block_size, grid_size;
    char* shared = nullptr;
};
extern Running machine;

using Operation = void (*)(void** lanes);  // carries out a warp operation, given each lane's operands

// All in runtime.cpp: a library of its own, which every compiled source is linked with.
[[noreturn]] void fail(const char* message);
void collective(Operation operation, void* operands);

struct Body {
    void (*call)(void* kernel, void** args);
    void* kernel;
    void** args;
    char *shared_start, *shared_stop;  // variables that the kernel declares in shared memory
};
const char* run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool deferred, unsigned seed, Body body);

// -- launching: one exported function a kernel ------------------------------------------------------------------------------

template <typename>
constexpr bool is_pointer = false;
template <typename OF>
constexpr bool is_pointer<OF*> = true;

template <size_t...>
struct Indices {};

template <typename... Args, size_t... I>
void call(void (*kernel)(Args...), void** args, Indices<I...>) {
    kernel(*static_cast<Args*>(args[I])...);
}
template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared, bool deferred, unsigned seed, void** args) {
    auto enter = [](void* kernel, void** args) {
        call(reinterpret_cast<void (*)(Args...)>(kernel), args, Indices<__integer_pack(sizeof...(Args))...>());
    };
    return run_grid(grid, block, shared, deferred, seed,
                    {enter, reinterpret_cast<void*>(kernel), args, __start_kernel_shared, __stop_kernel_shared});
}
// The sizes of the arguments, negative for pointers, after their number.
template <typename... Args>
const int* signature(void (*)(Args...)) {
    static const int sizes[] = {int(sizeof...(Args)), (is_pointer<Args> ? -1 : 1) * int(sizeof(Args))...};
    return sizes;
}

}  // namespace emulation

#define EXPORT_KERNEL(NAME)                                                                                             \
    extern "C" const int* signature_##NAME() { return emulation::signature(NAME); }                                     \
    extern "C" int static_shared_##NAME() { return int(__stop_kernel_shared - __start_kernel_shared); }                  \
    extern "C" const char* launch_##NAME(const unsigned* grid, const unsigned* block, size_t shared, int deferred,       \
                                         unsigned seed, void** args) {                                                  \
        return emulation::launch(NAME, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, deferred,    \
                                 seed, args);                                                                           \
    }
