// A registry in memory with the referrers API, for tests. It prints the address it listens at.
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Addr())
	os.Stdout.Close()
	quiet := log.New(os.Stderr, "", 0)
	handler := registry.New(registry.Logger(quiet), registry.WithReferrersSupport(true))
	log.Fatal(http.Serve(listener, handler))
}
