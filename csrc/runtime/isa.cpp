// SPDX-License-Identifier: Apache-2.0
#include "runtime/isa.h"

#ifdef PYBSP_HAVE_AVX2_VNNI
#include <cpuid.h>
#endif
#ifdef PYBSP_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef PYBSP_HAVE_NEON_DOT
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pybsp {
namespace {

constexpr Isa kAllIsas[] = {Isa::generic,     Isa::avx2, Isa::avx2_vnni, Isa::avx512,
                            Isa::avx512_vnni, Isa::amx,  Isa::neon,      Isa::neon_dot};

#ifdef PYBSP_HAVE_AVX2_VNNI
// GCC 12 has no name for it: CPUID leaf 7, subleaf 1, EAX bit 4.
bool cpu_has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

#ifdef PYBSP_HAVE_AMX
// CPUID leaf 7, EDX bits 22, 24 and 25, and the system's permission, which Linux gives
// to a process that asks.
bool may_use_amx() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         (edx & kNeeded) == kNeeded &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool cpu_supports(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
#ifdef PYBSP_HAVE_AVX2
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef PYBSP_HAVE_AVX512
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma");
#endif
#ifdef PYBSP_HAVE_AVX2_VNNI
    case Isa::avx2_vnni:
      return cpu_supports(Isa::avx2) && cpu_has_avx_vnni();
#endif
#ifdef PYBSP_HAVE_AVX512_VNNI
    case Isa::avx512_vnni:
      return cpu_supports(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef PYBSP_HAVE_AMX
    case Isa::amx:
      return cpu_supports(Isa::avx512) && __builtin_cpu_supports("avx512vnni") &&
             may_use_amx();
#endif
#ifdef PYBSP_HAVE_NEON
    case Isa::neon:
      return true;
#endif
#ifdef PYBSP_HAVE_NEON_DOT
    case Isa::neon_dot:
      return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
    default:
      return false;
  }
}

std::string join_names(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) {
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : kAllIsas) {
    if (name != isa_name(isa)) continue;
    for (Isa available : available_isas()) {
      if (available == isa) return isa;
    }
    throw std::invalid_argument(
        "PYBSP_ISA=" + name +
        " cannot run on this CPU; available: " + join_names(available_isas()));
  }
  throw std::invalid_argument("PYBSP_ISA=" + name + " is not an ISA; available: " +
                              join_names(available_isas()));
}

Isa initial_isa() {
  const char* forced = std::getenv("PYBSP_ISA");
  if (forced != nullptr && *forced != '\0') return isa_from_name(forced);
  return available_isas().back();
}

std::atomic<Isa>& selected_isa() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2_vnni:
      return "avx2_vnni";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::amx:
      return "amx";
    case Isa::neon:
      return "neon";
    case Isa::neon_dot:
      return "neon_dot";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found;
    for (Isa isa : kAllIsas) {
      if (cpu_supports(isa)) found.push_back(isa);
    }
    return found;
  }();
  return isas;
}

Isa active_isa() { return selected_isa().load(std::memory_order_relaxed); }

void set_active_isa(const std::string& name) { selected_isa() = isa_from_name(name); }

}  // namespace pybsp
