# agentvm: PostgreSQL as the control plane for AI agents' machines
#
#   make, make install, make clean    as with any PGXS extension (PG_CONFIG=... names the server)
#   make libvirt, install-libvirt     the provider libvirt, a library of its own (needs libvirt and yajl)
#   make gateway, install-gateway     the program that VMs knock at, into the server's bindir
#   make runtime, install-runtime     the program inside the VMs: one static binary, into the server's bindir
#   make check                        regress, isolation and TAP against this build, as an ordinary user: the extension
#                                     is installed into a private copy of the server (tmp_install), nowhere else
#   make check-regress REGRESS=name, check-isolation ISOLATION=name, check-tap PROVE_TESTS=test/t/x.pl   some of them
#   make SANITIZE=address,undefined ...   with the compiler's checks built in; test/lib/env.sh checked makes the tree's server fit
#   make format, make lint            clang-format; compilers with -Werror, cppcheck, shellcheck

PG_CONFIG ?= pg_config

# PGXS has a target "check" of its own, which only says that it is not supported: ours goes around it
ifneq ($(filter check,$(MAKECMDGOALS)),)
.PHONY: $(MAKECMDGOALS)
$(MAKECMDGOALS): ; +@$(MAKE) --no-print-directory $(if $(filter check,$@),check-regress check-isolation check-tap,$@)
else

EXTENSION = agentvm
MODULE_big = agentvm
OBJS = $(patsubst %.c,%.o,$(filter-out $(wildcard src/providers/libvirt*.c),$(wildcard src/*.c \
	$(foreach room,session team secret engine net providers,src/$(room)/*.c))))
DATA = $(wildcard sql/agentvm--*.sql)
TEST_MODULES = $(patsubst %.c,%.so,$(wildcard test/modules/*.c))

libraries = libcurl libxml-2.0 libcrypto
warnings = -Wall -Wextra -Werror=implicit-function-declaration -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers
PG_CPPFLAGS = -Isrc $(shell pkg-config --cflags $(libraries))
PG_CFLAGS = $(warnings) -pthread -MMD -MP
SHLIB_LINK = $(shell pkg-config --libs $(libraries)) -pthread
ifdef SANITIZE
checks = -fsanitize=$(SANITIZE) -fno-sanitize-recover=all
PG_CFLAGS += $(checks)
SHLIB_LINK += $(checks)
endif
# with libFuzzer in it: make CC=clang SANITIZE=fuzzer-no-link,address,undefined
ifneq ($(findstring fuzzer,$(SANITIZE)),)
OBJS += test/fuzz/fuzz.o
PG_CFLAGS += -fsanitize-coverage-allowlist=test/fuzz/coverage
SHLIB_LINK += $(shell $(CC) -print-file-name=libclang_rt.fuzzer_no_main-$(shell uname -m).a) -lstdc++ -Wl,-Bsymbolic
endif

REGRESS = $(sort $(basename $(notdir $(wildcard test/sql/*.sql))))
REGRESS_OPTS = --inputdir=$(srcdir)/test --outputdir=. --load-extension=pgcrypto --load-extension=agentvm
ISOLATION = $(sort $(basename $(notdir $(wildcard test/specs/*.spec))))
ISOLATION_OPTS = --inputdir=$(srcdir)/test --load-extension=pgcrypto --load-extension=agentvm
PROVE_TESTS = $(sort $(wildcard test/t/*.pl))

# one file tree of sources, objects and dependencies; test outputs
dependencies = $(OBJS:.o=.d) $(TEST_MODULES:.so=.d) $(patsubst %.c,%.d,$(wildcard src/providers/libvirt*.c))
EXTRA_CLEAN = $(dependencies) $(LIBVIRT) $(libvirt_objects) $(GATEWAY) $(RUNTIME) $(TEST_MODULES) tmp_install tmp_check tmp_check_regress tmp_check_iso output_iso results \
	regression.diffs regression.out tmp_fuzz

# no bitcode: nothing in here is worth inlining into a query, and it would need clang with the same flags
override with_llvm = no
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)
-include $(dependencies)

# The provider libvirt: a library of its own, so that the core does not need libvirt
LIBVIRT = agentvm_libvirt.so
libvirt_objects = $(patsubst %.c,%.o,$(wildcard src/providers/libvirt*.c))
.PHONY: libvirt install-libvirt
libvirt: $(LIBVIRT)
$(libvirt_objects): CPPFLAGS += $(shell pkg-config --cflags libvirt yajl)
$(LIBVIRT): $(libvirt_objects)
	$(CC) $(CFLAGS) $(CFLAGS_SL) -shared -o $@ $^ $(shell pkg-config --libs libvirt yajl libxml-2.0) -pthread $(checks)
# where it can be built, it is in the tests' server
tree_libvirt = $(shell pkg-config --exists libvirt yajl && echo libvirt)
install-libvirt: libvirt
	$(MKDIR_P) '$(DESTDIR)$(pkglibdir)'
	$(INSTALL_SHLIB) $(LIBVIRT) '$(DESTDIR)$(pkglibdir)/'

$(TEST_MODULES): %.so: %.c
	$(CC) $(CFLAGS) $(CFLAGS_SL) $(CPPFLAGS) -shared -o $@ $<

# The gateway: a program, not part of the library
GATEWAY = src/gateway/agentvm-gateway
gateway_flags = $(shell pkg-config --cflags --libs libwebsockets libuv libpq jansson libssl libcrypto libsystemd)
.PHONY: gateway install-gateway
gateway: $(GATEWAY)
$(GATEWAY): $(wildcard src/gateway/*.[ch] src/common/*.[ch]) src/protocol.h src/agentvm.h
	$(CC) -std=gnu11 -D_GNU_SOURCE -O2 -g $(warnings) $(GATEWAY_CFLAGS) -DAGENTVM_VERSION='$(shell sed -n 's/^\#define AGENTVM_VERSION //p' src/agentvm.h)' \
		-o $@ $(filter %.c,$^) $(gateway_flags)
install-gateway: gateway
	$(MKDIR_P) '$(DESTDIR)$(bindir)'
	$(INSTALL_PROGRAM) $(GATEWAY) '$(DESTDIR)$(bindir)/'

# The runtime: a static program, so that it runs in any image. It calls nothing of what libc.c stands in for
RUNTIME = src/runtime/agentvm-runtime
runtime_libraries = -lwebsockets -lcares -ljansson -lssl -lcrypto -lcap -larchive -lacl -lz
.PHONY: runtime install-runtime
runtime: $(RUNTIME)
$(RUNTIME): $(wildcard src/runtime/*.[ch] src/common/*.[ch]) src/protocol.h src/agentvm.h
	$(CC) -std=gnu11 -D_GNU_SOURCE -O2 -g $(warnings) $(RUNTIME_CFLAGS) -DAGENTVM_VERSION='$(shell sed -n 's/^\#define AGENTVM_VERSION //p' src/agentvm.h)' \
		-static -Wl,--gc-sections -Wl,--wrap=dlopen -o $@ $(filter %.c,$^) $(runtime_libraries)
install-runtime: runtime
	$(MKDIR_P) '$(DESTDIR)$(bindir)'
	$(INSTALL) -s -m 755 $(RUNTIME) '$(DESTDIR)$(bindir)/'

# What is fuzzed outside of a server, each a program of its own with libFuzzer in it: see test/fuzz/run
FUZZERS = $(addprefix tmp_fuzz/,gateway_http gateway_channel gateway_control runtime_answer mux tar)
fuzz_flags = -std=gnu11 -D_GNU_SOURCE -g -O1 -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
.PHONY: fuzzers
fuzzers: $(FUZZERS)
tmp_fuzz/gateway_%: test/fuzz/gateway.c $(filter-out %/main.c,$(wildcard src/gateway/*.[ch])) $(wildcard src/common/*.[ch]) src/protocol.h
	@mkdir -p $(@D)
	clang $(fuzz_flags) -DTARGET_$* -rdynamic -o $@ $(filter %.c,$^) $(gateway_flags)
tmp_fuzz/runtime_answer: test/fuzz/runtime_answer.c src/runtime/answer.c src/runtime/answer.h src/protocol.h
	@mkdir -p $(@D)
	clang $(fuzz_flags) -o $@ $(filter %.c,$^) -ljansson
tmp_fuzz/mux: test/fuzz/mux.c src/common/mux.c src/common/mux.h src/protocol.h
	@mkdir -p $(@D)
	clang $(fuzz_flags) -DPROTOCOL_CABLE_PIECE=600 -o $@ $(filter %.c,$^)
tmp_fuzz/tar: test/fuzz/tar.c src/runtime/tar.c src/runtime/tar.h src/runtime/files.c src/runtime/files.h src/common/log.c src/common/log.h
	@mkdir -p $(@D)
	clang $(fuzz_flags) -o $@ $(filter %.c,$^) -larchive -ljansson

# Tests. The databases' name is fixed, since agentvm.databases in test/temp.conf names it.
TREE = $(CURDIR)/tmp_install
CONTRIB_TESTDB = regression
ISOLATION_TESTDB = regression
in_tree = cd $(CURDIR) && PATH="$(TREE)$(bindir):$$PATH"

.PHONY: check-regress check-isolation check-tap tree format lint lint-format lint-gcc lint-clang lint-cppcheck lint-scripts
tree: all $(tree_libvirt) $(TEST_MODULES)
	@test/lib/env.sh tree $(TREE) $(PG_CONFIG)
	@$(MAKE) -s --no-print-directory install $(tree_libvirt:%=install-%) DESTDIR=$(TREE)
	@$(if $(TEST_MODULES),$(INSTALL_SHLIB) $(TEST_MODULES) $(TREE)$(pkglibdir)/)

check-regress: tree
	$(if $(REGRESS),$(in_tree) $(top_builddir)/src/test/regress/pg_regress --bindir=$(TREE)$(bindir) --temp-instance=tmp_check_regress \
		--temp-config=test/temp.conf --temp-config=$(TREE)/keys.conf $(REGRESS_OPTS) $(REGRESS))

check-isolation: tree
	@mkdir -p output_iso && ln -sfn ../expected output_iso/expected
	$(if $(ISOLATION),$(in_tree) $(top_builddir)/src/test/isolation/pg_isolation_regress --bindir=$(TREE)$(bindir) --temp-instance=tmp_check_iso \
		--outputdir=output_iso --temp-config=test/temp.conf --temp-config=$(TREE)/keys.conf $(ISOLATION_OPTS) $(ISOLATION))

check-tap: tree
	$(if $(PROVE_TESTS),$(in_tree) TESTDIR=$(CURDIR) TESTDATADIR=$(CURDIR)/tmp_check TESTLOGDIR=$(CURDIR)/tmp_check/log \
		PGPORT=65432 PG_REGRESS=$(top_builddir)/src/test/regress/pg_regress \
		AGENTVM_VENV=$${AGENTVM_VENV:-$$(test/lib/env.sh venv)} \
		prove -I $(top_srcdir)/src/test/perl -I test/lib $(PROVE_FLAGS) $(PROVE_TESTS))

# Style and static checks; compilers get no -o /dev/null, which as root they may replace
c_sources = $(wildcard src/*.c src/*/*.c test/modules/*.c test/sanitize/*.c test/fuzz/*.c test/clients/*.c)
scripts = $(shell find .ci test infra -type f -exec awk 'FNR == 1 && /^\#!.*bash/ { print FILENAME } { nextfile }' {} +)
strict = -O2 $(warnings) -Wmissing-prototypes -Wpointer-arith -Wvla -Werror -S -o - \
	$(subst -I$(includedir_server),-isystem $(includedir_server),$(CPPFLAGS)) -isystem $(shell $(PG_CONFIG) --includedir)

format:
	clang-format -i $(c_sources) $(wildcard src/*.h src/*/*.h)

lint: lint-format lint-gcc lint-clang lint-cppcheck lint-scripts
lint-format:
	@clang-format --dry-run --Werror $(c_sources) $(wildcard src/*.h src/*/*.h)
lint-gcc lint-clang: lint-%:
	@printf '%s\n' $(c_sources) | xargs -P2 -I{} $* $(if $(filter gcc,$*),$(strict) -Wshadow=compatible-local,$(strict) -Wshadow) {} >/dev/null
lint-cppcheck:
	@cppcheck --quiet --error-exitcode=1 --enable=warning,performance,portability --inline-suppr --suppress=varFuncNullUB --std=c99 \
		--library=test/cppcheck.cfg -Isrc $(c_sources)
lint-scripts:
	@shellcheck -x $(scripts)

endif
